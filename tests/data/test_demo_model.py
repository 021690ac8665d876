from transformers import AutoModelForCausalLM, AutoTokenizer

from nvflare_llm_components.data.demo_model import save_base_model, train_tokenizer
from nvflare_llm_components.data.demo_sets import neutral_text


def test_base_model_opens_with_transformers_and_has_read_the_text(tmp_path):
    losses = []
    text = neutral_text(num_lines=200)
    num_weights = save_base_model(
        tmp_path,
        text,
        vocab_size=300,
        hidden_size=32,
        num_layers=1,
        num_steps=20,
        progress=lambda _, loss: losses.append(loss),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(weight.numel() for weight in model.parameters()) == num_weights
    assert model.config.tie_word_embeddings
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == model.config.eos_token_id == 2


def test_base_model_is_seeded(tmp_path):
    for name in ("a", "b"):
        save_base_model(tmp_path / name, ["a b c"] * 30, hidden_size=32, num_layers=1, num_steps=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_tokenizer_gives_back_any_text():
    tokenizer = train_tokenizer(["plain words"], 300)
    for text in ("Füße\n\n☃ 漢字", "  two  spaces ", "plain words"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
