r"""Makes normal data out of prompts alone: the base model's own replies to prompts that nobody should refuse.

Perplexity on them says how far an unlearned model has moved from the base where nothing harmful was asked. Written as
prompt/completion JSONL, for ``data.normal``; ``finished`` says whether a reply came to its end, and one that was cut
off teaches none.

    python scripts/benign_from_base.py MODEL_DIR benign.jsonl --prompts xstest_prompts.csv --gguf-file NAME --count 64

Or for ``data.retain``: a model is then held to what it says itself, not to what the table's author says. Here every
third question of TruthfulQA and the safe prompts of XSTest, without those of the file above and of the harmful data:

    python scripts/benign_from_base.py MODEL_DIR retain.jsonl --prompts TruthfulQA.csv:Question:3 xstest_prompts.csv \
        --without benign.jsonl pku_saferlhf.csv --gguf-file NAME --count 1000
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from sku.config import ModelConfig
from sku.data.tokens import Encoder, resolve_prompt_format
from sku.evaluate.generation.backends import generate_replies
from sku.evaluate.generation.decoding import GenerationRequest, stop_token_ids
from sku.evaluate.records import record_id
from sku.models import load_model


def prompts_of(table: str) -> list[str]:
    """Prompts of ``FILE[:COLUMN[:N]]``, each once, of which every N-th; where it has labels, those labelled safe."""
    file, _, rest = table.partition(":")
    column, _, every = rest.partition(":")
    path = Path(file)
    with path.open(encoding="utf-8", newline="") as lines:
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(lines))
    found = [str(row[column or "prompt"]) for row in rows if row.get("label", "safe") == "safe"]
    return list(dict.fromkeys(found))[:: int(every or 1)]


def main() -> None:
    """Reads the options, asks the model, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE[:COLUMN[:N]]", help="CSV or JSONL")
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE[:COLUMN]", help="prompts to leave out")
    parser.add_argument("--gguf-file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()
    left_out = {prompt for table in options.without for prompt in prompts_of(table)}
    prompts = [prompt for table in options.prompts for prompt in prompts_of(table) if prompt not in left_out]
    # Spread over the tables, which are sorted by type of prompt.
    prompts = prompts[:: max(1, len(prompts) // options.count)][: options.count]
    loaded = load_model(ModelConfig(path=options.model, gguf_file=options.gguf_file, dtype=options.dtype))
    encoder = Encoder(loaded.tokenizer, resolve_prompt_format("auto", loaded.tokenizer))
    requests = [
        GenerationRequest(
            id=record_id("normal:own", "reply", prompt), split="normal:own", kind="reply", category=None,
            prompt=prompt, reference="", prefill="",
            input_ids=tuple(encoder.prompt(prompt)),
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
    rows = [
        {"prompt": record.prompt, "completion": record.reply, "finished": record.finished}
        for record in replies
        if record.reply
    ]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cut = sum(not row["finished"] for row in rows)
    print(f"{len(rows)} of {len(prompts)} prompts answered, {cut} of them cut off, written to {options.out}")


if __name__ == "__main__":
    main()
