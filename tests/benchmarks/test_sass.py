"""The reader of machine code: which instructions a loop has, and which of them are the main loop's."""

from __future__ import annotations

from benchmarks.sass import Count, count_loops, instructions

# A loop over tiles with a loop of products inside; where a wait fails, it is tried again behind the end.
NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;             /* 0x00000a0000017a02 */
                                                                      /* 0x000fe40000000f00 */
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR17+0x30000], R3 ;
        /*0040*/              @!P3 BRA 0x00b0 ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/             @!UP3 BRA 0x0030 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/               @P1 BRA 0x0020 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR17+0x30000], R3 ;
        /*00c0*/              @!P3 BRA 0x00b0 ;
        /*00d0*/                   BRA 0x0050 ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def test_the_loop_of_products_is_the_main_one() -> None:
    found = count_loops(NESTED)
    assert found is not None
    assert found.own[found.main] == Count(instructions=5, matrix=1, slow=0, drains=0)
    assert found.around == Count(instructions=3, matrix=0, slow=1, drains=1)


def test_a_wait_for_all_products_inside_the_loop_is_a_drain() -> None:
    found = count_loops(NESTED.replace("gsb0, 0x1", "gsb0, 0x0"))
    assert found is not None
    assert found.own[found.main].drains == 1


def test_without_products_the_loop_with_the_most_of_its_own_is_the_main_one() -> None:
    found = count_loops(NESTED.replace("HGMMA.64x256x16.F32.BF16", "FADD").replace("WARPGROUP", "NOTHING"))
    assert found is not None
    assert found.own[found.main].instructions == 5
    assert found.around.slow == 1


def test_code_without_a_loop() -> None:
    assert count_loops("/*0000*/ MOV R1, R2 ;\n/*0010*/ EXIT ;") is None
    assert [x.name for x in instructions("/*0000*/ @!UPT UMOV UR4, 0x1 ; /*0010*/ NOP;")] == ["UMOV"]


def test_cycles_are_those_of_the_slower_unit() -> None:
    assert Count(100, 4, 0, 0).cycles(8) == 200
    assert Count(100, 4, 20, 0).cycles(8) == 320
