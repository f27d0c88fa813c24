"""Normal text compared at another point of the line through the original and the bad model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, ModelMaker, TrainerMaker
from sku.errors import RecipeError
from sku.training.trainer import UnlearningTrainer

from .test_packing import assert_packed_is_padded, collators, disturb, terms_and_gradients


def scale_adapter(trainer: UnlearningTrainer, factor: float) -> None:
    """Moves the model itself to that point of the line."""
    model: Any = trainer.model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(factor)


@pytest.mark.parametrize("at", [-1.0, -2.5, 0.5])
@pytest.mark.parametrize("packing", ["padded", "tree"])
def test_normal_text_is_read_by_the_model_at_that_point_and_harmful_text_by_the_bad_one(
    at: float, packing: str, make_trainer: TrainerMaker
) -> None:
    def terms(preservation_at: float, factor: float) -> dict[str, Tensor]:
        trainer = make_trainer(preservation_mode="retention", preservation_at=preservation_at, packing=packing)
        disturb(trainer)
        scale_adapter(trainer, factor)
        return terms_and_gradients(trainer, collators(trainer)[packing])[0]

    mirrored, bad, there = terms(at, 1.0), terms(1.0, 1.0), terms(1.0, at)
    for name in ("guided_distortion", "random_disassociation"):
        torch.testing.assert_close(mirrored[name], bad[name], rtol=1e-6, atol=1e-6)
    kept = "preservation_divergence"
    torch.testing.assert_close(mirrored[kept], there[kept], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mirrored[kept], bad[kept], rtol=1e-2)


def test_the_gradient_is_that_of_the_point(make_trainer: TrainerMaker) -> None:
    """d/dB of KL(P || Q_(-2 B)) is -2 times the gradient at -2 B."""

    def gradients(preservation_at: float, factor: float) -> dict[str, Tensor]:
        trainer = make_trainer(
            preservation_mode="retention",
            preservation_at=preservation_at,
            weights={"guided_distortion": 0.0, "random_disassociation": 0.0},
            packing="tree",
        )
        disturb(trainer)
        scale_adapter(trainer, factor)
        return terms_and_gradients(trainer, collators(trainer)["tree"])[1]

    mirrored, there = gradients(-2.0, 1.0), gradients(1.0, -2.0)
    seen = 0
    for name, gradient in mirrored.items():
        factor = -2.0 if "lora_B" in name else 1.0
        torch.testing.assert_close(gradient, factor * there[name], rtol=1e-4, atol=1e-7, msg=name)
        seen += bool(gradient.any())
    assert seen == len(mirrored)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_packed_is_padded(architecture: str, make_model: ModelMaker, make_trainer: TrainerMaker) -> None:
    trainer = make_trainer(
        make_model(architecture), preservation_mode="retention", preservation_at=-1.0, packing="tree"
    )  # fmt: skip
    disturb(trainer)
    assert_packed_is_padded(trainer)


def test_afterwards_the_adapter_counts_as_it_is(make_trainer: TrainerMaker) -> None:
    trainer = make_trainer(preservation_mode="retention", preservation_at=-1.0, max_steps=2)
    trainer.train()
    model: Any = trainer.model
    assert not any(module._forward_hooks for module in model.modules())


def test_recomputed_layers_are_scaled_too(make_trainer: TrainerMaker) -> None:
    def trained(**settings: Any) -> dict[str, Tensor]:
        trainer = make_trainer(preservation_mode="retention", preservation_at=-1.0, max_steps=2, **settings)
        trainer.train()
        assert trainer.model is not None
        return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    plain, recomputed = trained(), trained(activation_checkpointing=True)
    for name, weight in plain.items():
        torch.testing.assert_close(recomputed[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_training_spares_the_unlearned_model_rather_than_the_bad_one(make_trainer: TrainerMaker) -> None:
    """Divergence on normal text of both, after the same steps."""

    def divergences(preservation_at: float) -> tuple[float, float]:
        trainer = make_trainer(
            preservation_mode="retention",
            preservation_at=preservation_at,
            weights={"preservation_divergence": 20.0},
            max_steps=30,
            learning_rate=1e-2,
        )
        trainer.train()
        found = []
        for factor in (1.0, -1.0):
            plain = make_trainer(preservation_mode="retention", packing="tree")
            plain.model.load_state_dict(trainer.model.state_dict())  # type: ignore[union-attr]
            plain.model.eval()  # type: ignore[union-attr]
            scale_adapter(plain, factor)
            terms = terms_and_gradients(plain, collators(plain)["tree"])[0]
            found.append(float(terms["preservation_divergence"].mean()))
        return found[0], found[1]

    of_bad, of_unlearned = divergences(1.0)
    mirrored_bad, mirrored_unlearned = divergences(-1.0)
    assert mirrored_unlearned < of_unlearned
    assert mirrored_bad > of_bad


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"full": True}, "all weights are trained"),
        ({"lora": {"use_dora": True}}, "not linear in what it adds"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "is trained too"),
        ({"lora": {"target_modules": ["embed_tokens"]}}, "changes embeddings"),
        (
            {"lora": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}},
            r"more than linear layers \(ParamWrapper\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_scaled_is_refused(
    settings: dict[str, Any], reason: str, make_trainer: TrainerMaker, make_model: ModelMaker
) -> None:
    with pytest.raises(RecipeError, match=f"preservation_at is -1, which needs plain LoRA, and .*{reason}"):
        make_trainer(make_model("llama"), preservation_mode="retention", preservation_at=-1.0, **settings)
