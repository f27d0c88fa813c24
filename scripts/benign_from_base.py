"""Makes a benign set out of prompts alone: the base model's own replies to prompts that nobody should refuse.

Perplexity on them says how far an unlearned model has moved from the base where nothing harmful was asked. Written as
prompt/completion JSONL, for ``data.benign``.

    python scripts/benign_from_base.py MODEL_DIR xstest_prompts.csv benign.jsonl --gguf-file NAME --count 60

With another table it makes normal data of the same kind, for ``data.retain``: a model is then held to what it says
itself, not to what the table's author says.

    python scripts/benign_from_base.py MODEL_DIR TruthfulQA.csv retain.jsonl --column Question --count 1000
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from sku.config import ModelConfig
from sku.data.prompts import resolve_prompt_format
from sku.data.tokenization import tokenize_prompt
from sku.evaluate.generation import GenerationRequest, generate_replies, stop_token_ids
from sku.evaluate.sampling import record_id
from sku.models import load_model


def safe_prompts(path: Path, column: str) -> list[str]:
    """Prompts of a table, each once; where it has labels, as XSTest's has, those labelled safe."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(row[column] for row in csv.DictReader(file) if row.get("label", "safe") == "safe"))


def main() -> None:
    """Reads the options, asks the model, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path, help="table with the prompts, such as XSTest's")
    parser.add_argument("out", type=Path)
    parser.add_argument("--column", default="prompt", help="column of the prompts")
    parser.add_argument("--gguf-file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    loaded = load_model(ModelConfig(path=options.model, gguf_file=options.gguf_file, dtype=options.dtype))
    style = resolve_prompt_format("auto", loaded.tokenizer)
    prompts = safe_prompts(options.prompts, options.column)
    # Spread over the table, which is sorted by type of prompt.
    prompts = prompts[:: max(1, len(prompts) // options.count)][: options.count]
    requests = [
        GenerationRequest(
            id=record_id("benign", "reply", prompt), split="benign", kind="reply", category=None, prompt=prompt,
            reference="", forced_start="", input_ids=tuple(tokenize_prompt(prompt, loaded.tokenizer, style)),
        )
        for prompt in prompts
    ]  # fmt: skip
    replies = generate_replies(
        loaded.model,
        loaded.tokenizer,
        requests,
        stop_ids=stop_token_ids(loaded.model, loaded.tokenizer),
        max_new_tokens=options.max_new_tokens,
        batch_size=20,
    )
    rows = [{"prompt": record.prompt, "completion": record.reply} for record in replies if record.reply]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} of {len(prompts)} prompts answered, written to {options.out}")


if __name__ == "__main__":
    main()
