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
import dataclasses
import gates, gates_gptq, gates_int4, machine_code
from epmq.kernels import tune

sweep, moments = gates_gptq.gptq_gate(90), gates_gptq.gram_gate(90, "bf16", False, False)
tile = next(shape for shape in tune.shapes(90) if (shape.block_m, shape.block_n) == (8, 128))
product = gates_int4.product_gate(90, "fp16", 128, tile, True)
for gate in (sweep, moments, product):
    assert not gate.faults, gate
gates_gptq.MOST_PER_COLUMN, machine_code.SHARED_BYTES[90] = 10, 1024
shared = f"{sweep.counts.shared} bytes of shared memory"
assert gates_gptq.gptq_gate(90).faults == [shared, "more than 10 instructions per column"]
assert gates_gptq.gram_gate(90, "bf16", False, False).faults == [f"{moments.counts.shared} bytes of shared memory"]

def broken(**changes):
    return gates_int4.broken(dataclasses.replace(product.counts, **changes), False, 90, tile)

assert broken() == []
for change in ({"conversions": 1}, {"permutes": 5}, {"stores": 1}, {"loads": 1}, {"wide_copies": 3}, {"waits": 16},
               {"tensor": "none"}):
    assert len(broken(**change)) == 1, change
assert gates_int4.broken(product.counts, True, 90, tile) == [f"wgmma is serialized ({product.counts.waits} waits)"]

before = dataclasses.asdict(product.counts)
for now, said in ((1.04, []), (1.06, ["each 1.06, 1.0 before"])):
    assert list(gates.grown(dataclasses.replace(product.counts, each=now), {**before, "each": 1.0})) == said
assert list(gates.grown(dataclasses.replace(product.counts, spills=1), before)) == ["spills 1, 0 before"]
assert list(gates.grown(product.counts, {})) == []

operations, loops = machine_code.parse('''
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
assert operations == ["FFMA", "NOP", "STL", "BRA", "BRA", "BRA"] and loops == [(1, 3), (0, 4)], (operations, loops)
"""


@pytest.mark.slow
def test_the_gates_pass_and_can_fail() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
