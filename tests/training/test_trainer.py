"""What a batch counts for, in each of the shapes that TRL's collator gives it."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nvflare_llm_components.training.trainer import Tally

ROWS = [[5, 6, 7], [8, 9], [5, 5, 5, 5, 5]]


@pytest.mark.parametrize("multiple", [None, 8, 16])
@pytest.mark.parametrize("padding_free", [False, True])
def test_padding_counts_neither_as_rows_nor_as_tokens(padding_free, multiple):
    collate = DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=multiple
    )
    tally = Tally()
    tally.add(collate([{"input_ids": row} for row in ROWS]), torch.tensor(0.5))
    assert (tally.num_examples, tally.num_tokens) == (3, 10)


def test_packed_rows_count_one_by_one():
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
    packed = [
        {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [5] * 6, "seq_lengths": [6]},
    ]
    tally = Tally()
    tally.add(collate(packed), torch.tensor(0.5))
    assert (tally.num_examples, tally.num_tokens) == (3, 11)
