"""What only two processes can show."""

from __future__ import annotations

from tests.contracts.test_objectives import FOUND
from tests.distributed.launch import two_processes


def test_the_law_on_two_ranks_with_a_text_only_rank():
    """LLaVA#759: ranks that call different modules hang; and a mean of means weighs samples wrongly."""
    output = two_processes("law_worker.py")
    assert output.count("law:") == 6 * len(FOUND)
