"""One of two ranks that hold a vocabulary: python sharded_ranks.py RANK STORE CASES RESULTS, the last three files."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from videor1_kernels import linear_grpo_loss, linear_logprob
from videor1_kernels.integrations.verl import linear_cross_entropy


def compute(case: dict[str, Any], start: int, end: int, shard: tuple[int, Any] | None) -> dict[str, Any]:
    """Results and gradients of a case on a part of its vocabulary; ``shard`` None: on all of it."""
    hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"][start:end].clone().requires_grad_()
    bias = None if case["bias"] is None else case["bias"][start:end].clone().requires_grad_()
    head = {"bias": bias, "temperature": case["temperature"], "softcap": case["softcap"], "vocab_shard": shard}
    if case.get("verl"):
        options = case["temperature"], "none", shard and shard[1]
        found = linear_cross_entropy(hidden, weight, case["labels"], *options, backend=case["backend"])
        torch.autograd.backward(found, case["incoming"])
        results = {"logp": found[0], "entropy": found[1]}
    elif case["loss"] is None:
        found = linear_logprob(hidden, weight, case["labels"], **head, backend=case["backend"])
        torch.autograd.backward(found, case["incoming"])
        results = {"logp": found[0], "entropy": found[1]}
    else:
        out = linear_grpo_loss(hidden, weight, case["labels"], **case["loss"], **head, backend=case["backend"])
        out.loss.backward()
        results = {"loss": out.loss, "logp": out.logp, "entropy": out.entropy, "kl": out.kl}
        results["skipped"] = torch.tensor(out.skipped_rows)
    results |= {"d_hidden": hidden.grad, "d_weight": weight.grad}
    results |= {} if bias is None else {"d_bias": bias.grad}
    return {name: x.detach() for name, x in results.items()}


def mistakes(group: Any) -> list[str]:
    """The messages of what is refused by all ranks alike."""
    hidden, weight, found = torch.randn(2, 4), torch.randn(3, 4), []
    for labels, shard in (([0, 9], 3 * group.rank()), ([0, 1], 0)):
        try:
            linear_logprob(hidden, weight, torch.tensor(labels), vocab_shard=(shard, group))
        except ValueError as error:
            found.append(str(error))
    return found


def main() -> None:
    rank, store, cases, results = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    group, found = dist.group.WORLD, []
    for case in torch.load(cases):
        start, end = case["parts"][int(rank)]
        found.append(compute(case, start, end, (start, group)))
    torch.save((found, mistakes(group)), results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
