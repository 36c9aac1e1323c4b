"""`lm_eval_tasks.py FOLDER [--items N] [--lines N] [--seed N]`: kvserve's own items as tasks of
lm-evaluation-harness, with their data beside them, so that no data set has to be fetched.

`kvserve_citation` and `kvserve_classify` are multiple choice, scored by the likelihood of each
answer (an echo of the prompt with its log probabilities); `kvserve_recall` is completed greedily
and its first number compared.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from kvserve.eval.tasks.item import Item
from kvserve.eval.tasks.short import TOPICS
from kvserve.eval.tasks.suite import make_items

HEAD = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: " "
metadata:
  version: 1
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""
COMPLETION = """output_type: generate_until
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
filter_list:
  - name: first-number
    filter:
      - function: regex
        regex_pattern: "(\\\\d+)"
      - function: take_first
metric_list:
  - metric: exact_match
"""


def choices(items: list[Item], find: str) -> Iterator[dict[str, object]]:
    """Each item with its answer and three other findings of its text, in a drawn order."""
    for index, item in enumerate(items):
        random = Random(index)
        others = sorted(set(re.findall(find, item.prompt)) - {item.answer})
        among = [item.answer, *random.sample(others, min(3, len(others)))]
        random.shuffle(among)
        yield {"prompt": item.prompt, "choices": among, "gold": among.index(item.answer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--lines", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    items = make_items(("citation", "classify", "recall"), asked.items, asked.lines, asked.seed)
    topics = "|".join(TOPICS)
    tasks = {
        "citation": (CHOICE, list(choices(items["citation"], r"\d+\.\d\d"))),
        "classify": (CHOICE, list(choices(items["classify"], rf"(?<=Topic: )(?:{topics})"))),
        "recall": (
            COMPLETION,
            [{"prompt": item.prompt, "answer": item.answer} for item in items["recall"]],
        ),
    }
    for name, (kind, rows) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        head = HEAD.format(task=f"kvserve_{name}", data=json.dumps(str(data)))
        (folder / f"kvserve_{name}.yaml").write_text(head + kind, "utf-8")


if __name__ == "__main__":
    main()
