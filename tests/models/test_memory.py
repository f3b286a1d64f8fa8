"""What a run is planned to need."""

import torch
from conftest import tiny_decoder

from lib.models import memory

CPU = torch.device("cpu")


def needed(**needs) -> dict[str, int]:
    return memory.Needs(**needs).of(tiny_decoder("llama"), 2, 1000)


def test_hessians_and_solver_are_counted_from_the_widest_block():
    """Of a block with q, k, v, o, gate, up (32 inputs) and down (48 inputs), fp32."""
    assert needed(hessians=1)["Hessians"] == 4 * (6 * 32**2 + 48**2)
    assert needed(hessians=3)["Hessians"] == 3 * needed(hessians=1)["Hessians"] and needed()["Hessians"] == 0
    down = 4 * (memory.SOLVER_SQUARES * 48**2 + memory.SOLVER_WEIGHTS * 32 * 48)
    assert needed(solver=True)["solver"] == down and needed()["solver"] == 0


def test_training_is_counted_from_the_widest_block():
    block = sum(parameter.numel() for parameter in tiny_decoder("llama").blocks[0].parameters())
    assert needed(training=True)["training of a block"] == block * (17 + 2) + memory.GRAPH_WIDTH * 1000
    assert needed()["training of a block"] == 0


def test_what_an_update_needs_can_make_the_difference(monkeypatch):
    decoder, options = tiny_decoder("llama"), {"memory": "auto", "dtype": torch.float32, "device": CPU, "seq_length": 1}
    plain, solved = memory.Needs(), memory.Needs(hessians=1, solver=True)
    with_solver = sum(solved.of(decoder, 4, 128).values())
    monkeypatch.setattr(memory, "free_bytes", lambda device: (with_solver - 1) / memory.RESERVE)
    assert memory.plan(decoder, solved, **options).streamed and not memory.plan(decoder, plain, **options).streamed


def test_a_streamed_plan_holds_one_block(monkeypatch):
    decoder = tiny_decoder("llama")
    options = {"dtype": torch.float32, "device": CPU, "seq_length": 1, "activation_memory": 1.0}
    resident, streamed = (memory.plan(decoder, memory.Needs(4), memory=how, **options) for how in ("resident", "streamed"))
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    assert resident.bytes["weights"] - streamed.bytes["weights"] == 4 * block * (len(decoder) - 1)
    assert resident.bytes["sums of gradients"] == len(decoder) * streamed.bytes["sums of gradients"] == len(decoder) * 4 * block
