"""A multiple-choice task of the tests' own for lm-evaluation-harness: its YAML over a JSONL file, no network."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from conftest import VOCABULARY

NAME = "own_choices"
COUNT = 12  # questions for the tiny models
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="no lm_eval: pip install -r requirements-eval.txt"
)
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: brier_score
"""

# What a small model of English knows, and what it may not.
QUESTIONS = [
    ("The capital of France is", ["Paris", "a spoon", "seventeen"], 0),
    ("Fish live in the", ["oven", "water", "library"], 1),
    ("Two plus two is", ["four", "orange", "a river"], 0),
    ("At night the sky is", ["dark", "delicious", "wooden"], 0),
    ("The opposite of hot is", ["music", "cold", "purple"], 1),
    ("Snow is", ["loud", "green", "white"], 2),
    ("A week has seven", ["elephants", "days", "moons"], 1),
    ("Birds can", ["read", "vote", "fly"], 2),
    ("The President lives in the White", ["House", "Horse", "Sauce"], 0),
    ("Bread is made from", ["glass", "flour", "clouds"], 1),
    ("The sun rises in the", ["east", "west", "south"], 0),
    ("Water freezes at zero degrees", ["Celsius", "Fahrenheit", "Kelvin"], 0),
    ("The author of Hamlet is", ["Charles Dickens", "William Shakespeare", "Jane Austen"], 1),
    ("The largest planet is", ["Mars", "Earth", "Jupiter"], 2),
    ("The chemical symbol of gold is", ["Ag", "Au", "Go"], 1),
    ("A spider has this many legs:", ["six", "eight", "ten"], 1),
]


def write(folder: Path, rows: list[tuple[str, list[str], int]] = QUESTIONS, name: str = NAME) -> Path:
    """The folder for --include_path; the task's name is `name`."""
    tasks, data = folder / "tasks", folder / f"{name}.jsonl"
    tasks.mkdir(parents=True, exist_ok=True)
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in rows]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tasks / f"{name}.yaml").write_text(YAML.format(name=name, data=data))
    return tasks


def questions_of_words(count: int = COUNT) -> list[tuple[str, list[str], int]]:
    """For the tiny models' tokenizer: one token a word, and answers of one to three."""
    rng = random.Random(5)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{rng.randint(3, VOCABULARY - 1)}" for _ in range(rng.randint(least, most)))

    return [(words(3, 8), [words(1, 3) for _ in range(4)], rng.randrange(4)) for _ in range(count)]
