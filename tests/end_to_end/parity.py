"""A session's model as transformers sees it, and gradients of the two under the same names."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megavila.data.prompt import Prompt
from megavila.training.session import Session
from tests.models.hf_reference import hf_gradients


def hf_language_model(session: Session, directory: Any) -> Qwen2ForCausalLM:
    """`transformers` reading the exported checkpoint's language model."""
    from megavila.models import save_hf

    save_hf(session.model, directory, session.tokenizer.directory)
    model = Qwen2ForCausalLM.from_pretrained(
        directory / "llm", dtype=torch.float32, attn_implementation="eager"
    )
    return model.train()


def hf_logits(hf: Qwen2ForCausalLM, prompt: Prompt, media_rows: Tensor | None, response: Tensor) -> Tensor:
    """(R, vocab) logits of one sequence: prompt with its media, then the response; nothing is shared."""
    ids = torch.cat([prompt.token_ids, response])
    embeddings = hf.get_input_embeddings()(ids)
    if media_rows is not None:
        places = (prompt.media_index >= 0).nonzero().squeeze(1)
        embeddings = embeddings.index_copy(0, places, media_rows.detach()[prompt.media_index[places]])
    logits = hf(inputs_embeds=embeddings[None]).logits[0]
    return logits[len(prompt.token_ids) - 1 : -1]


def assert_gradients_equal(session: Session, hf: Qwen2ForCausalLM, tolerance: float = 2e-5) -> None:
    """The buffer's gradients of the language model against transformers', relative to each one's norm."""
    for slot in session.gradients.slots:
        slot.parameter.grad = slot.view(session.gradients.flat).clone()
    for parameter in session.model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ours = hf_gradients(session.model)
    for name, parameter in hf.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
        error = (ours[f"llm.{name}"] - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, f"{name}: {error:.2e}"
