"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  /** Create an element. Its children are nodes or text; text is never interpreted as markup. */
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  // Charts
  const plots = [];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const axis = (which) => ({ [`${which}.gridcolor`]: of("--grid"), [`${which}.linecolor`]: of("--line"), [`${which}.tickcolor`]: of("--line") });
    return {
      "font.color": of("--quiet"), "font.family": getComputedStyle(document.body).fontFamily, "font.size": 12,
      "legend.font.color": of("--text"), "hoverlabel.bgcolor": of("--card"), "hoverlabel.bordercolor": of("--line"),
      "hoverlabel.font.color": of("--text"), ...axis("xaxis"), ...axis("yaxis"),
    };
  }

  async function draw() {
    for (const { id, figure } of read("chart-data")) {
      const div = document.getElementById(`chart-${id}`);
      const layout = { ...figure.layout, dragmode: coarse ? false : "zoom" };
      for (const [name, value] of Object.entries(colours())) {
        const [last, ...outer] = name.split(".").reverse();
        outer.reverse().reduce((node, part) => node[part] ??= {}, layout)[last] = value;
      }
      await Plotly.newPlot(div, figure.data, layout, { responsive: true, displayModeBar: false });
      plots.push(div);
      await new Promise((done) => setTimeout(done)); // keeps the page responsive while charts are drawn
    }
    document.documentElement.dataset.drawn = plots.length;
  }
  dark.addEventListener("change", () => plots.forEach((div) => Plotly.relayout(div, colours())));
  draw();

  // Rollouts
  const { runs, cards, media } = read("rollout-data");
  const view = document.getElementById("rollout");
  if (!view) return;
  const get = (id) => document.getElementById(id);
  const pick = get("pick");
  const filters = { run: get("filter-run"), step: get("filter-step"), right: get("filter-right"), bonus: get("filter-bonus") };
  let matching = [];
  let coloured = true;

  const number = (value, digits = 2) => value === null ? "—" : value.toFixed(digits).replace("-", "−");
  const signed = (value) => value === null ? "—" : (value > 0 ? "+" : "") + number(value);
  const seconds = (value) => number(value, value < 10 ? 2 : value < 1000 ? 1 : 0); // fewer decimals for larger numbers, to fit the space
  const plain = (value) => value === null ? "—" : String(Math.round(value * 1000) / 1000).replace("-", "−");

  function fill(select, values, label) {
    select.append(el("option", { value: "" }, "any"));
    for (const value of values) select.append(el("option", { value }, label(value)));
  }

  function matches(card) {
    const bonus = card.bonus === null ? null : card.bonus > 0 ? "yes" : "no";
    const own = { run: String(card.run), step: String(card.step), right: card.right, bonus };
    return Object.entries(filters).every(([name, select]) => !select || !select.value || select.value === own[name]);
  }

  function title(card) {
    const run = runs.length > 1 ? `${runs[card.run]} · ` : "";
    const bonus = card.bonus > 0 ? ` · bonus ${signed(card.bonus)}` : "";
    return `${run}step ${card.step} · ${card.count[0]}/${card.count[1]} correct${bonus} · ${card.question.split("\n")[0]}`;
  }

  function filter() {
    const before = matching[pick.selectedIndex];
    matching = cards.filter(matches);
    pick.replaceChildren(...matching.map((card, i) => el("option", { value: i }, title(card))));
    pick.selectedIndex = Math.max(0, matching.indexOf(before));
    pick.disabled = !matching.length;
    show();
  }

  function show() {
    const at = pick.selectedIndex;
    get("previous").disabled = at <= 0;
    get("next").disabled = at < 0 || at >= matching.length - 1;
    get("position").textContent = matching.length ? `${at + 1} of ${matching.length}` : "none";
    view.replaceChildren(matching.length ? cardOf(matching[at]) : el("p", {}, "No rollout on this page is like that."));
  }

  function move(by) {
    const to = pick.selectedIndex + by;
    if (to < 0 || to >= matching.length) return;
    pick.selectedIndex = to;
    show();
  }

  function cardOf(card) {
    const right = card.completions.filter((completion) => completion.right).length;
    const above = [...card.completions, ...card.shuffled].some(partly) ? ` (accuracy above ${plain(card.above)})` : "";
    const head = [`Step ${card.step}`, `problem ${card.problem}`, `draw ${card.draw}`];
    if (runs.length > 1) head.unshift(runs[card.run]);
    const node = el("article", { class: coloured ? "card" : "card plain", "aria-label": `Rollout of step ${card.step}` },
      el("h3", {}, head.join(" · ")),
      el("p", { class: "question", dir: "auto" }, card.question));
    if (card.options.length) node.append(choices(card));
    if (!card.options.some((option) => isSolution(option, card))) {
      node.append(el("p", {}, "Solution: ", el("b", {}, el("bdi", {}, card.solution))));
    }
    if (Array.isArray(card.media)) {
      card.media.forEach((index, i) => node.append(
        el("h4", {}, `${card.kinds[i] === "image" ? "Image" : "Video"} ${i + 1} of ${card.media.length}: `, el("bdi", {}, media[index].name)),
        branches({ kind: card.kinds[i], unit: card.unit, permutation: card.permutation && card.permutation[i] }, media[index])));
    } else if (card.media !== null) node.append(branches(card, media[card.media]));
    node.append(means(card));
    node.append(el("h4", {}, `Completions from ${card.permutation ? "frames in order" : card.kind === "text" ? "the text" : `the ${card.kind}`}: ${right} of ${card.completions.length} correct${above}`));
    if (card.tokens) node.append(legend(node));
    else node.append(el("p", { class: "note" }, "Tokens and log-probs of this prompt were not recorded (option log_tokens)."));
    if (card.opened) node.append(el("p", { class: "note" }, "The chat template opens each completion with ", el("code", {}, JSON.stringify(card.opened)), ", which is no part of its tokens."));
    node.append(el("div", { class: "completions" }, ...card.completions.map((completion, i) => completionCard(completion, `${i + 1}`))));
    if (card.asked) {
      const left = card.asked - card.shuffled.length;
      const correct = card.shuffled.filter((completion) => completion.right).length;
      const result = card.shuffled.length ? `${correct} of ${card.shuffled.length} correct${above}` : "none was run to its end";
      node.append(el("h4", {}, `Completions from shuffled frames: ${result}`));
      if (left) node.append(el("p", { class: "note" }, `${left} of ${card.asked} were skipped or stopped: they could no longer change the advantages.`));
      node.append(el("div", { class: "completions" }, ...card.shuffled.map((completion, i) => completionCard(completion, `shuffled ${i + 1}`))));
    }
    return node;
  }

  const partly = (completion) => completion.right && completion.accuracy < 1;
  const isSolution = (option, card) => option === card.solution || option.startsWith(`${card.solution}.`);

  function choices(card) {
    return el("ul", { class: "choices", "aria-label": "Options" }, ...card.options.map((option) => isSolution(option, card)
      ? el("li", { class: "solution" }, "✓ ", el("bdi", {}, option), el("span", { class: "kind" }, " solution"))
      : el("li", {}, el("bdi", {}, option))));
  }

  function means(card) {
    const rows = [["p, frames in order", number(card.p)]];
    if (card.asked) {
      rows.push(["p~, shuffled", card.p_shuffled === null ? "not known" : number(card.p_shuffled)]);
      rows.push(["temporal bonus", card.bonus === null ? "not known" : signed(card.bonus)]);
    }
    return el("dl", { class: "tiles" }, ...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  function branches(card, clip) {
    if (!clip.frames.length) return el("p", { class: "problem" }, "No frames of ", el("bdi", {}, clip.name), ": ", el("bdi", {}, clip.note));
    const order = clip.frames.map((_, i) => i);
    const node = el("div", { class: "branches" }, strip(card.kind === "image" ? "Image" : "Frames in order", order, clip));
    if (!card.permutation) return node;
    const pairs = card.unit === "temporal_patch";
    const shuffled = pairs ? card.permutation.flatMap((i) => [2 * i, 2 * i + 1]) : card.permutation;
    if (shuffled.length !== order.length || shuffled.some((i) => i >= order.length)) {
      node.append(el("p", { class: "problem" }, `The run shuffled ${shuffled.length} frames, but the file gives ${order.length} now: it may have changed.`));
    } else {
      node.append(strip(`Frames shuffled${pairs ? ", in pairs" : ""}`, shuffled, clip));
    }
    return node;
  }

  function strip(name, order, clip) {
    const count = clip.frames.length;
    const frames = order.map((i, place) => el("li", { style: `--hue: ${Math.round(250 * (1 - i / Math.max(1, count - 1)))}` },
      el("img", { src: clip.frames[i], alt: `Place ${place + 1}: frame ${i + 1} of ${count}, at ${seconds(clip.times[i])} seconds` }),
      el("span", {}, el("b", {}, `${i + 1}`), count > 1 ? el("time", {}, `${seconds(clip.times[i])} s`) : null)));
    return el("section", {}, el("h4", {}, name), el("ol", { class: count > 1 ? "frames" : "frames one" }, ...frames));
  }

  function completionCard(completion, name) {
    const verdict = !completion.right ? "✗ wrong" : partly(completion) ? "◐ partly correct" : "✓ correct";
    const head = el("p", {}, el("span", { class: "verdict" }, verdict), `completion ${name}`);
    if ("source" in completion) head.append(el("span", {}, "from the data ", el("b", {}, completion.source)));
    const figures = [["accuracy", plain(completion.accuracy)]];
    if ("reward" in completion) {
      figures.push(["format", plain(completion.format)], ["tokens", `${completion.length}${completion.cut ? " (cut at the limit)" : ""}`]);
      figures.push(["reward", number(completion.reward)], ["advantage", signed(completion.advantage)]);
    }
    for (const [label, value] of figures) head.append(el("span", {}, `${label} `, el("b", {}, value)));
    if ("reward" in completion) head.append(bar(completion.advantage || 0));
    const node = el("article", { class: completion.right ? "completion right" : "completion", "aria-label": `Completion ${name}` }, head);
    if (completion.tokens) node.append(...tokens(completion));
    else node.append(text(completion.text.length, {}, completion.text));
    return node;
  }

  function text(length, attributes, ...children) {
    const tall = length > 1200;
    return el("p", { dir: "auto", tabindex: tall ? 0 : null, ...attributes, class: `text${tall ? " tall" : ""} ${attributes.class || ""}` }, ...children);
  }

  function bar(value) {
    const width = Math.min(1, Math.abs(value) / 2.5) * 50;
    const side = value < 0 ? `right: 50%; width: ${width}%` : `left: 50%; width: ${width}%`;
    return el("span", { class: "bar", "aria-hidden": "true" }, el("i", { class: value < 0 ? "less" : "", style: side }));
  }

  // Tokens
  const LEVELS = [["p above 0.95", -0.0513], ["0.5 to 0.95", -0.693], ["0.1 to 0.5", -2.303], ["0.01 to 0.1", -4.605], ["below 0.01", -Infinity]];
  const level = (logp) => LEVELS.findIndex(([, least]) => logp >= least);

  function legend(node) {
    const box = el("input", { type: "checkbox", id: "coloured", checked: coloured });
    box.addEventListener("change", () => {
      coloured = box.checked;
      node.classList.toggle("plain", !coloured);
    });
    const logps = (i) => i === 4 ? "< −4.61" : `≥ ${number(LEVELS[i][1])}`;
    return el("div", { class: "legend" }, el("label", {}, box, " Colour tokens by probability (log-prob):"),
      ...LEVELS.map(([name], i) => el("mark", { class: `t${i}` }, `${name} (${logps(i)})`)),
      el("span", {}, "Point at or tap a token for its own."));
  }

  function tokens(completion) {
    const info = el("p", { class: "token-info", role: "status" });
    const length = completion.tokens.reduce((sum, token) => sum + token.length, 0);
    const line = text(length, { class: "tokens" }, ...completion.tokens.map((token, i) => {
      const logp = completion.logps[i];
      const said = logp === null ? "log-prob not known" : `log-prob ${number(logp, 4)}, p ${Math.exp(logp).toPrecision(3)}`;
      const name = token === "" ? "part of a character" : JSON.stringify(token);
      const span = el("span", { class: logp === null ? "tx" : `t${level(logp)}`, title: `${name}: ${said}`, "data-token": i }, ...shown(token));
      return span;
    }));
    line.addEventListener("click", (event) => {
      const span = event.target.closest("[data-token]");
      if (!span) return;
      line.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
      span.classList.add("chosen");
      info.textContent = `Token ${Number(span.dataset.token) + 1} of ${completion.tokens.length}, ${span.title}`;
    });
    return [line, info];
  }

  /** Make line ends and partial characters visible by signs. */
  function shown(token) {
    if (token === "") return [el("i", { class: "sign" }, "▯")];
    return token.split(/(\n)/).filter(Boolean).flatMap((part) => part === "\n" ? [el("i", { class: "sign" }, "↵"), "\n"] : [part]);
  }

  // Navigation
  if (filters.run) fill(filters.run, runs.keys(), (i) => runs[i]);
  fill(filters.step, [...new Set(cards.map((card) => card.step))], (step) => `${step}`);
  Object.values(filters).forEach((select) => select && select.addEventListener("change", filter));
  pick.addEventListener("change", show);
  get("previous").addEventListener("click", () => move(-1));
  get("next").addEventListener("click", () => move(1));
  document.addEventListener("keydown", (event) => {
    const busy = event.target.closest("select, input, textarea, .scroll, .tall");
    if (busy || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  filter();
  const rewarded = cards.findIndex((card) => card.bonus > 0); // The first rollout shown is one with a temporal bonus.
  if (rewarded > 0) move(rewarded);
})();
