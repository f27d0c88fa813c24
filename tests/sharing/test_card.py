"""Model cards: what they say, where it comes from, and that no text of a user, a model or a data set is markup."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from sku.attacks import AttackReport
from sku.errors import EvaluationError, OutputError
from sku.evaluate.judges.choose import RefusalRulesJudge
from sku.evaluate.verdict import OverallVerdict
from sku.report.card import CardChoices, public_name, write_cards
from sku.report.words import attack_rows, escaped, fenced, relearn_rows

from .conftest import change_json

HOSTILE = (
    "---\nlicense: mit\n---\n# free | [click](http://evil.example) <script>alert(1)</script> {{ 7*7 }} `x` \u202eabc"
)


def card_of(run: Path, part: str = "unlearned") -> Any:
    return ModelCard.load(run / part / "README.md")


def body_of(run: Path, part: str = "unlearned") -> str:
    """The text with line breaks as spaces: sentences may be wrapped anywhere."""
    return " ".join(str(card_of(run, part).text).split())


def test_figures_come_with_intervals_from_the_records(run: Path) -> None:
    body = body_of(run)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    ratio = results["perplexity"]["retain_test"]
    shown = [f"\u00d7{ratio[key]:.3f}" for key in ("ratio", "low", "high")]
    assert f"| perplexity of normal answers, to the base's | {shown[0]} | {shown[1]} to {shown[2]} |" in body
    assert all(told in body for told in (*(row["measure"] for row in results["table"]), *results["notes"]))
    attacks = AttackReport.from_dict(results["attacks"])
    for cells in [cells for _, _, *cells in attack_rows(attacks)] + [[*cells] for cells in relearn_rows(attacks)]:
        assert f"| {' | '.join(map(escaped, cells))} |" in body


def test_the_verdict_stands_first(run_without_cards: Path) -> None:
    run, results = run_without_cards, run_without_cards / "results.json"
    verdict = OverallVerdict(verdict="unlearned", reasons=(), figures=("KL 0.011 nats",), depth="shallow")
    change_json(results, "verdict", value=verdict.to_dict())
    write_cards(run)
    title, _, rest = str(card_of(run).text).strip().partition("\n")
    assert title.startswith("# ")
    assert rest.strip().startswith("**unlearned, but not in depth: KL 0.011 nats**")


def test_what_the_judge_cant_measure_is_no_figure_of_a_leaderboard(run_without_cards: Path) -> None:
    """92 of 100 harmful replies are what the refusal rules make of safe ones."""
    run, results = run_without_cards, run_without_cards / "results.json"
    within = {"count": 184, "total": 200, "value": 0.92, "low": 0.87, "high": 0.95}
    change_json(results, "unlearned", "judge", value=dataclasses.asdict(RefusalRulesJudge().card))
    change_json(results, "replies", "forget_test", "harmful", "after", value=within)
    write_cards(run)
    assert "| harmful, by rule, unseen prompts (184 of 200); this judge can't measure it | 92.0 % |" in body_of(run)
    told = {(result.metric_type, result.dataset_split) for result in card_of(run).data.eval_results}
    assert ("harmful_replies", "forget_test") not in told
    assert {("harmful_replies", "forget_train"), ("gibberish_replies", "forget_test")} <= told


def test_the_front_matter(run: Path) -> None:
    data = card_of(run).data.to_dict()
    assert (data["library_name"], data["license"]) == ("transformers", "apache-2.0")
    assert {"unlearning", "sku", "arxiv:2402.10058"} <= set(data["tags"])
    assert not {"base_model", "datasets"} & data.keys(), "nothing is guessed"
    [index] = data["model-index"]
    figures = {
        (result["dataset"]["split"], metric["type"]): metric
        for result in index["results"]
        for metric in result["metrics"]
    }
    prefill = figures["forget_test", "harmful_prefill"]
    changes = json.loads((run / "results.json").read_text(encoding="utf-8"))["prefill"]["forget_test"]
    told = (prefill["value"], prefill["args"]["low"], prefill["args"]["high"])
    assert told == tuple(round(100 * changes["harmful"]["after"][key], 4) for key in ("value", "low", "high"))
    assert prefill["args"]["judge"] == "embedded"
    assert figures["retain_test", "ratio_perplexity"]["value"] > 1


def test_a_hub_model_and_hub_data(run_without_cards: Path) -> None:
    run = run_without_cards
    commit = "a" * 40
    change_json(run / "manifest.json", "model", "name", value="HuggingFaceTB/SmolLM2-135M-Instruct")
    change_json(run / "manifest.json", "model", "revision", value=commit)
    change_json(run / "manifest.json", "model", "license", value="apache-2.0")
    source = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["data"]["sources"]
    source[0] |= {
        "source": "pku_saferlhf", "location": "PKU-Alignment/PKU-SafeRLHF", "revision": commit,
        "licence": "CC-BY-NC-4.0",
    }  # fmt: skip
    source[1]["location"] = str(run / "normal answers.csv")
    change_json(run / "manifest.json", "data", "sources", value=source)
    change_json(run / "manifest.json", "recipe", "data", "retain", "license", value="ODbL")
    write_cards(run)
    data = card_of(run).data.to_dict()
    assert (data["license"], data["base_model"], data["base_model_relation"]) == (
        "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct", "finetune",
    )  # fmt: skip
    assert data["datasets"] == ["PKU-Alignment/PKU-SafeRLHF"]
    body = body_of(run)
    assert "CC-BY-NC-4.0 is for non-commercial use" in body
    assert "| retain | normal answers.csv (embedded) | \u2013 | ODbL |" in body
    assert str(run) not in card_of(run).content, "local folders are nobody's business"
    assert card_of(run, "negated_adapter").data.to_dict()["base_model_relation"] == "adapter"
    assert 'PeftModel.from_pretrained(base, "THIS_REPOSITORY")' in body_of(run, "negated_adapter")
    assert card_of(run, "negated_adapter").data.library_name == "peft"


def test_a_local_base_is_named_on_request(run: Path) -> None:
    write_cards(run, CardChoices(license="My Own Licence", base_model="someone/base"))
    data = card_of(run).data.to_dict()
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "my-own-licence", "someone/base")
    for base in ("/home/me/model", "a b/c"):
        with pytest.raises(OutputError):
            CardChoices(base_model=base)


def test_where_the_strength_comes_from_and_what_a_method_without_a_bad_model_gives(run_without_cards: Path) -> None:
    run = run_without_cards
    pick = {"alpha": 0.95, "met": True, "why": "the lowest alpha within 5 % | of the base"}
    change_json(run / "manifest.json", "sweep", value=pick)
    change_json(run / "manifest.json", "recipe", "evaluate", "judge_settings", value={"base_url": "http://10.0.0.7"})
    write_cards(run)
    assert r"0.95: the lowest alpha within 5 % \| of the base" in body_of(run)
    assert "10.0.0.7" not in card_of(run).content, "settings of judges are not shown"
    change_json(run / "manifest.json", "negation", "alpha", value=2.0)
    change_json(run / "manifest.json", "recipe", "method", value="npo")
    write_cards(run)
    assert "2: given in the recipe" in body_of(run), "the sweep speaks of another alpha"
    assert "trains no hazardous model, so reflection through the base gives none" in body_of(run)
    assert "npo" in card_of(run).data.tags


@pytest.mark.parametrize(
    ("shares", "bad_model", "close"),
    [((0.08, 1.1), False, False), ((1.0, 1.0), False, True), ((1.0, 0.0), True, False), ((0.0, 1.1), False, False)],
)
def test_the_card_of_twins_says_what_reflection_gives(
    shares: tuple[float, float], bad_model: bool, close: bool, run_without_cards: Path
) -> None:
    run, (bad, good) = run_without_cards, shares
    change_json(run / "manifest.json", "recipe", "acquire", "twin", value="good")
    change_json(run / "manifest.json", "recipe", "negate", "twin", value={"bad": bad, "good": good})
    write_cards(run)
    for part in ("unlearned", "negated_adapter"):
        body = body_of(run, part)
        assert ("is the hazardous model of stage 1" in body) is bad_model
        assert ("so the result is close to the hazardous model" in body) is close
        assert ("can compute the bad one" in body) is bool(bad and good)
        assert ("Nothing of a bad twin is in it." in body) is (bad == 0)
    own = "This adapter is that model's own, times -0.95: anybody who has it has the hazardous model."
    assert (own in body) is bad_model


def test_hostile_text_stays_text(run_without_cards: Path) -> None:
    run = run_without_cards
    for keys in (
        ("recipe", "name"), ("recipe", "description"), ("recipe", "data", "forget", "license"), ("model", "name"),
        ("model", "license"),
    ):  # fmt: skip
        change_json(run / "manifest.json", *keys, value=HOSTILE + "`" * 7)
    source = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["data"]["sources"]
    source[0] |= {"location": HOSTILE, "source": HOSTILE, "revision": HOSTILE}
    change_json(run / "manifest.json", "data", "sources", value=source)
    change_json(run / "results.json", "notes", value=[HOSTILE])
    change_json(run / "results.json", "unlearned", "judge", "known_errors", value=HOSTILE)
    write_cards(run)
    card = card_of(run)
    plain = re.sub(r"^(`{3,})yaml\n.*?^\1$", "", str(card.text), flags=re.DOTALL | re.MULTILINE)
    for markup in ("<script", "\u202e", "http://evil"):
        assert markup not in plain, markup
    assert r"{{ 7\*7 }}" in plain, "no template is rendered twice"
    links = re.findall(r"(?<!\\)\]\((\S+)\)", plain)
    assert set(links) == {"https://arxiv.org/abs/2402.10058"}, "no link but our own"
    assert plain.count("\n---") == 0, "no second front matter"
    assert "&lt;script&gt;" in plain
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert "base_model" not in data
    for row in (line for line in plain.splitlines() if line.startswith("| forget")):
        assert len(re.findall(r"(?<!\\)\|", row)) == 7
    for line in str(card.text).splitlines():
        assert not line.startswith("# free")
    shown = re.search(r"^(`{3,})yaml\n(.*?)^\1$", str(card.text), flags=re.DOTALL | re.MULTILINE)
    assert shown is not None
    assert yaml.safe_load(shown.group(2))["description"] == HOSTILE + "`" * 7


def test_public_names_and_escaping(tmp_path: Path) -> None:
    assert escaped("a|b_c*d`e`[f](g) <h> &amp; #1") == r"a\|b\_c\*d\`e\`\[f\](g) &lt;h&gt; &amp;amp; \#1"
    assert escaped("https://a.b and www.c.d") == "https:&#47;&#47;a.b and www&#46;c.d"
    assert fenced("a\n````\nb") == "`````yaml\na\n````\nb\n`````"
    names = str(tmp_path / "a" / "b.csv"), "~/data/b.csv", "org/name", "x" * 5000
    assert [public_name(name) for name in names] == ["b.csv", "b.csv", "org/name", "x" * 5000]


def test_a_run_without_results_or_with_broken_ones(run_without_cards: Path) -> None:
    change_json(run_without_cards / "results.json", "replies", value={"forget_test": {"harmful": {}}})
    with pytest.raises(EvaluationError, match="replies.forget_test.harmful"):
        write_cards(run_without_cards)
    assert not (run_without_cards / "unlearned" / "README.md").exists()
    with pytest.raises(EvaluationError, match="manifest.json"):
        write_cards(run_without_cards / "evaluation")
