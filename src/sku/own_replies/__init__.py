"""Data in the model's own words: its replies to harmful and normal prompts, written down before it is trained.

Other people's answers have a style of their own, and a model that unlearns them unlearns the style. What is written
here is what the model itself says, in the prompt format of the run.
"""
