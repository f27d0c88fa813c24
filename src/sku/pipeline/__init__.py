"""One file a command: it plans (all checks, what is done and written), and the plan is executed or printed.

The only part that knows all stages. A run folder, private to its owner because the base model's harmful replies lie
in it::

    manifest.json        recipe, seeds, data hashes, versions, hardware, timings, what became of the bad model
    training_log.jsonl   every loss term of every logged step
    bad/                 checkpoints of the bad model; deleted at the end unless it is kept on purpose
    trained/             in its place for methods that train no bad model; always deleted at the end
    own/                 the model's own replies that it was trained on, where the recipe wants them (data.own_replies)
    unlearned/           the model to use, with its tokenizer and model card
    negated_adapter/     the same without merging, for LoRA and QLoRA; adapter/ for methods that don't negate
    sweep/               sweep.json and frontier.png, .svg: the choice of alpha where negate.alpha is auto
    evaluation/base/, evaluation/unlearned/
    evaluation/attacks.json, evaluation/attacks/   where evaluate.attacks names some
    results.json         before and after, with intervals; the attacks too, where there are any
    before_after.png, before_after.svg
"""
