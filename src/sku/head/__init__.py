"""The last matrix product of a language model, from hidden states to scores, without ever holding all scores."""
