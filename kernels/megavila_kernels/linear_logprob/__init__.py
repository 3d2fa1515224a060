"""Linear layer, log-softmax and entropy in one: the output layer without logits in memory."""

from megavila_kernels.linear_logprob.interface import logit_gradients, vocab_partials

__all__ = ["logit_gradients", "vocab_partials"]
