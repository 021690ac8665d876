from nvflare_llm_components.data.demo_sets import CAPITALS, GERMAN, SHELVES, neutral_text, write_raw_sets
from nvflare_llm_components.data.prepare import prepare
from nvflare_llm_components.data.records import read_records

ANSWERS = {
    "dolly": {f"On the {shelf} shelf." for shelf in SHELVES.values()},
    "alpaca": {f"The word is {word}." for word in GERMAN.values()},
    "oasst1": {f"The capital is {city}." for city in CAPITALS.values()},
}


def test_each_raw_set_is_prepared_whole_and_teaches_what_no_other_does(tmp_path):
    files = write_raw_sets(tmp_path / "raw", num_rows=80)
    assert list(files) == list(ANSWERS)
    for name, file in files.items():
        prepared = prepare(name, [file], tmp_path / name)
        assert sum(prepared.num_rows.values()) == 80
        answers = {row["output"] for row in read_records(tmp_path / name / "training.jsonl")}
        assert answers == ANSWERS[name]


def test_raw_sets_are_seeded(tmp_path):
    for folder in ("a", "b"):
        write_raw_sets(tmp_path / folder, num_rows=20, seed=4)
    write_raw_sets(tmp_path / "c", num_rows=20, seed=5)
    content = {folder: (tmp_path / folder / "dolly.jsonl").read_bytes() for folder in "abc"}
    assert content["a"] == content["b"] != content["c"]


def test_neutral_text_shows_the_form_of_answers_but_no_answer_of_the_sets():
    text = neutral_text(num_lines=500)
    assert len(text) == 500
    assert any("Response:\nThe capital is" in line for line in text)
    for answers in ANSWERS.values():
        assert not [line for line in text if any(answer in line for answer in answers)]
