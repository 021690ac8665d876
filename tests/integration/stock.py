"""What stock transformers says of a saved model: the judge that shares no code with ours."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWER_CUE = "\n\nResponse:\n"


@torch.no_grad()
def stock_loss(folder: Path, rows: Path) -> float:
    """Mean loss over the answers' tokens, of rows of ``{"input", "output"}``, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss_sum, num_tokens = 0.0, 0
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer(row["input"] + ANSWER_CUE)["input_ids"]
        answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        loss_sum, num_tokens = loss_sum + float(loss) * len(answer), num_tokens + len(answer)
    return loss_sum / num_tokens
