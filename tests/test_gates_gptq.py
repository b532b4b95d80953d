"""The static gates: compiled in a process of their own, because this one may interpret its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[1]
CHECK = """
import gates_gptq as gates
first, second = gates.gptq_row(90), gates.gram_row(90, "bf16", False, False)
assert not first["problems"] and not second["problems"], (first, second)
gates.MOST_PER_COLUMN, gates.MOST_SHARED[90] = 10, 1024
assert gates.gptq_row(90)["problems"] == "more than 10 instructions per column"
assert gates.gram_row(90, "bf16", False, False)["problems"] == "too much shared memory"
for growth, problems in ((1.04, ""), (1.06, "100 instructions before")):
    entry = {**first, "instructions": 100 * growth}
    gates.against({gates.name_of(first): 100}, entry)
    assert entry["problems"] == problems, entry
opcodes, loops = gates.parse('''
.L_x_0:
        /*0000*/                   FFMA R1, R2, R3, R4 ;
.L_x_1:
        /*0010*/              @!PT LDS RZ, [RZ] ;
        /*0020*/               @P1 STL [R1], R2 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
''')
assert opcodes == ["FFMA", "STL", "BRA", "BRA", "BRA"] and loops == [(1, 2), (0, 3)], (opcodes, loops)
"""


@pytest.mark.slow
def test_the_gates_pass_and_can_fail() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
