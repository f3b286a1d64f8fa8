"""The errors that updates of weights leave, as figures and means take them. In: "errors_by_block" of results.json."""

import logging
import math

logger = logging.getLogger(__name__)

NAMED = 4  # linears that a line in the log names
ByBlock = dict[str, dict[str, float]]  # block -> linear -> value


def errors_left(by_block: dict[str, dict]) -> dict[str, ByBlock]:
    """The errors that updates leave, from the "errors_by_block" of a results.json; quantities without values are left out.

    {"error": {block: {linear, or "output" for the block's output: error}}, "error_held_out": the same for the linears alone}.
    """
    errors: dict[str, dict] = {"error": {}, "error_held_out": {}}
    for i, block in by_block.items():
        linears = block["linears"]
        output = {"output": float(block["output"]["after"])} if block["output"] else {}
        errors["error"][i] = {name: float(error["updated"]) for name, error in linears.items()} | output
        errors["error_held_out"][i] = {
            name: float(error["updated_held_out"]) for name, error in linears.items() if "updated_held_out" in error
        }
    return {quantity: blocks for quantity, blocks in errors.items() if any(blocks.values())}


def defined(errors: dict[str, ByBlock], source: str) -> dict[str, ByBlock]:
    """The errors of `errors_left` without those that are no numbers, such as 0/0 of outputs that are all zero; the log names
    them, of the results in `source`. Blocks and quantities that have no others are left out."""
    numbers: dict[str, ByBlock] = {}
    for quantity, blocks in errors.items():
        undefined = [f"{i} {name}" for i, block in blocks.items() for name, error in block.items() if not math.isfinite(error)]
        if undefined:
            more = f" and {len(undefined) - NAMED} more" if len(undefined) > NAMED else ""
            logger.warning(
                "%s: the %s of %s%s is not defined (nan or inf), and left out of figures and means",
                source, quantity.replace("_", " "), ", ".join(f"block {one}" for one in undefined[:NAMED]), more,
            )  # fmt: skip
        finite = {i: {name: error for name, error in block.items() if math.isfinite(error)} for i, block in blocks.items()}
        numbers[quantity] = {i: block for i, block in finite.items() if block}
    return {quantity: blocks for quantity, blocks in numbers.items() if blocks}
