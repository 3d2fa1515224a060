"""A short question whose answer shows that an engine has the trainer's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megavila.data.prompt import Prompt
from megavila.data.row import Row
from megavila.models import VisionLanguageModel
from megavila.mrsp.layout import Group, build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.rollout.protocol import Response, SamplingParams
from megavila.rollout.weights import WeightTransferError
from megavila.runtime.collectives import gather_objects
from megavila.runtime.seeds import derive_seed

# Longer than two blocks of 32 tokens: keys and values left over from older weights would be reused, and seen.
PROMPT_TOKENS = 69
RESPONSE_TOKENS = 6

# Nats. A right transfer differs by the order of summation: by 5e-6 in fp32 and by up to 3e-2 in bfloat16.
# A wrong q, k or v alone moves log-probs by several nats.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class WeightProbe:
    """A fixed prompt, the same at every transfer on purpose: a prefix cache that outlived its weights answers it.

    Args:
        model: the trainer's.
        max_tokens: longest prompt and response the engine holds together.
    """

    params = SamplingParams(max_tokens=RESPONSE_TOKENS)
    seed = derive_seed("weight probe")

    def __init__(self, model: VisionLanguageModel, max_tokens: int) -> None:
        self._model = model
        length = max(1, min(PROMPT_TOKENS, max_tokens - RESPONSE_TOKENS))
        generator = torch.Generator().manual_seed(self.seed)
        self.prompt = Prompt(
            token_ids=torch.randint(0, model.language.vocab_size, (length,), generator=generator),
            position_ids=torch.arange(length),
            media_index=torch.full((length,), -1),
            videos=(),
            tokens_per_frame=1,
            next_position=length,
            row=Row(problem_id="weight-probe", problem="", data_type="text"),
            fingerprint="weight-probe",
        )

    def check(self, response: Response, version: int) -> float:
        """Compare the engine's log-probs with the trainer's own; the largest difference in nats.

        Called by all ranks of the run, each with its engine's response.

        Raises:
            WeightTransferError: on some rank it is above the limit for the model's type.
        """
        ours = self._trainer_logprobs(response.token_ids)
        topology = self._model.language.topology
        found = gather_objects(float((ours - response.logprobs).abs().max()), topology.world_group)
        difference = max(found, key=lambda value: value if value == value else float("inf"))
        limit = LIMITS[self._model.dtype]
        if not difference <= limit:  # also where it is not a number
            raise WeightTransferError(
                f"after weight transfer {version} the engine's log-probs differ from the trainer's by up to "
                f"{difference:.3g} nats, the limit for {self._model.dtype} is {limit}: weights were mixed up on the "
                "way, or cached keys and values are older than the weights"
            )
        return difference

    def same(self, answer: Response, before: Response) -> bool:
        """Whether an engine with the weights that it had before still gives its answer."""
        if not torch.equal(answer.token_ids, before.token_ids):
            return False
        return float((answer.logprobs - before.logprobs).abs().max()) <= LIMITS[self._model.dtype]

    @torch.no_grad()
    def _trainer_logprobs(self, token_ids: Tensor) -> Tensor:
        layout = build_layout([Group(self.prompt, (token_ids,))])
        device = self._model.language.output_weight().device
        return response_logprobs(self._model, layout.to(device), None).cpu()
