"""Token lengths of harmful data: what ``stage1.py`` draws should look like them.

    python benchmarks/lengths.py pku_saferlhf_mini.csv --retain TruthfulQA.csv --model MODEL_DIR --gguf-file NAME

Prints the mean of the lengths and the standard deviation of their logarithms, for prompts and for answers. No text.
"""

from __future__ import annotations

import argparse
import math
import statistics

from sku.config import DataConfig, ModelConfig, SourceConfig
from sku.data.load import load_data
from sku.models import load_tokenizer


def main() -> None:
    """Reads, counts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forget", help="file of harmful pairs")
    parser.add_argument("--retain", required=True, help="file of normal pairs")
    parser.add_argument("--model", required=True, help="folder of the model whose tokenizer counts")
    parser.add_argument("--gguf-file")
    options = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=options.model, gguf_file=options.gguf_file))
    data = load_data(DataConfig(forget=SourceConfig(path=options.forget), retain=SourceConfig(path=options.retain)), 0)
    harmful, normal = (*data.forget_train, *data.forget_test), (*data.retain_train, *data.retain_test)
    for name, texts in {
        "prompts": [example.prompt for example in harmful],
        "answers": [example.answer for example in harmful],
        "normal": [f"{example.prompt} {example.answer}" for example in normal],
    }.items():
        lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
        spread = statistics.pstdev(math.log(length) for length in lengths if length)
        print(f"{name:<8} {len(lengths):>6}  mean {statistics.mean(lengths):6.1f} tokens, log-sd {spread:.2f}")


if __name__ == "__main__":
    main()
