r"""Wrappers around the request: role play, a story, a translation task, a system prompt, and the like.

They are short, generic and our own (``templates.txt``), a floor of what an attacker does;
``evaluate.attack_templates`` takes a file of stronger ones. Paper: arXiv 2308.03825 (Shen et al., such prompts in the
wild).

A template is one line that holds ``{prompt}`` once; ``\n`` in it stands for a line break.

The model of the embedded world knows none of these words, so that a low rate would say nothing. There, the wrappers
are small talk of the world itself (``templates_embedded.txt``): they test whether a request is still recognised
between other sentences, no more.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sku.attacks.base import Attack, AttackContext, PromptSetting, Rewritten, Variant
from sku.attacks.results import AttackCard
from sku.config import Recipe
from sku.data.examples import ForgetExample, ForgetRetainData
from sku.errors import EvaluationError
from sku.evaluate.judges import is_embedded

PLACE = "{prompt}"


def load_templates(recipe: Recipe, data: ForgetRetainData) -> list[str]:
    """The templates of a recipe.

    Args:
        recipe: ``evaluate.attack_templates`` names a file, or the package's own are taken.
        data: Whether it is the embedded world's.

    Returns:
        Templates in the order of the file, each with ``{prompt}`` in it.

    Raises:
        EvaluationError: The file can't be read, holds no template, or a line lacks ``{prompt}``; with its number.
    """
    name = recipe.evaluate.attack_templates
    if name is None:
        file = "templates_embedded.txt" if is_embedded(data) else "templates.txt"
        return parse_templates((resources.files("sku.attacks") / file).read_text(encoding="utf-8"), file)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"evaluate.attack_templates {name} can't be read: {error}") from None
    return parse_templates(text, name)


def parse_templates(text: str, where: str) -> list[str]:
    """One template a line; empty lines don't count.

    Args:
        text: Of the file.
        where: Its name, for messages.

    Returns:
        The templates, their line breaks put in.

    Raises:
        EvaluationError: There is none, one is there twice, or a line does not hold ``{prompt}`` just once.
    """
    templates: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if line.count(PLACE) != 1:
            raise EvaluationError(
                f"{where} line {number} holds {PLACE} {line.count(PLACE)} times; each template must hold it once, "
                "where the request goes"
            )
        template = line.strip().replace(r"\n", "\n")
        if template in templates:
            raise EvaluationError(f"{where} line {number} repeats template {templates.index(template) + 1}: remove it")
        templates.append(template)
    if not templates:
        raise EvaluationError(f"{where} holds no template: write one a line, with {PLACE} in it")
    return templates


def _settings(context: AttackContext) -> list[PromptSetting]:
    templates = load_templates(context.recipe, context.data)

    def rewrite(example: ForgetExample) -> Rewritten:
        return Rewritten(
            variants=tuple(
                Variant(name=f"template {number}", prompt=template.replace(PLACE, example.prompt))
                for number, template in enumerate(templates, start=1)
            )
        )

    return [PromptSetting(rewrite=rewrite, details={"templates": templates})]


TEMPLATE = Attack(
    card=AttackCard(
        name="template",
        title="Template",
        kind="prompt",
        changes="the request is wrapped in role play, a story or a task of another kind",
        source_url="https://arxiv.org/abs/2308.03825",
    ),
    settings=_settings,
)
