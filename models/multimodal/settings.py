"""Settings that families of text, images and speech share; imports no torch.

Images come in one of two ways. As codes (Chameleon, arXiv 2405.09818) they are ids like any others, and `image` is
null. As continuous latents (Transfusion, arXiv 2408.11039) they enter through a stem, leave through its mirror, and
are trained by denoising.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..batch import MODALITIES
from ..section import Section

__all__ = ["ImageConfig", "MultimodalConfig", "UNetConfig"]

DEBUG_WIDTH = 64
DEBUG_UNET_WIDTH = 32


class UNetConfig(Section):
    """Down- and up-sampler around the backbone. Transfusion (section 4.1) gives 0.27B parameters and no layout; this is
    one of that size at d_model 4096.
    """

    outer_width: int = Field(640, gt=0, description="channels at the latents' size")
    inner_width: int = Field(1280, gt=0, description="channels at half of it")
    blocks: int = Field(2, gt=0, description="residual blocks at each size, down and up alike")
    groups: int = Field(32, gt=0, description="groups of the group norms")
    head_width: int = Field(64, gt=0, description="width of the attention heads at half size")

    @model_validator(mode="after")
    def _divides(self) -> UNetConfig:
        for name in ("outer_width", "inner_width"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of groups {self.groups}"
                )
        if self.inner_width % self.head_width:
            raise ValueError(
                f"inner_width {self.inner_width} is not a multiple of head_width {self.head_width}"
            )
        return self


class ImageConfig(Section):
    """Continuous images: the shape of their latents, how they enter and leave, and how they are trained."""

    channels: int = Field(8, gt=0, description="channels of a latent")
    size: int = Field(32, gt=0, description="height and width of a latent")
    patch: int = Field(
        2, gt=0, description="side of the square of a latent that one position holds"
    )
    stem: Literal["linear", "unet"] = Field(
        "linear", description="how latents become positions, and back"
    )
    unet: UNetConfig = Field(UNetConfig(), description="of stem: unet")
    position_table: bool | None = Field(
        None,
        description="learned embeddings of a patch's row and column; null is yes with the linear stem",
    )
    skip: bool = Field(
        True, description="the way out sees what came in beside what the backbone made of it"
    )
    time_width: int = Field(
        256, gt=0, multiple_of=2, description="sines and cosines of the noise level"
    )
    schedule: Literal["cosine", "linear"] = Field(
        "cosine", description="how signal turns into noise"
    )
    timesteps: int = Field(1000, gt=1, description="noise levels")
    prediction: Literal["epsilon", "v"] = Field("epsilon", description="what the model predicts")
    loss_weight: float = Field(
        5.0, ge=0, description="factor on the denoising loss (Transfusion, section 4.2)"
    )
    first_limit: int | None = Field(
        500,
        gt=0,
        description="noise levels below which an image is kept that scored text follows; null is all",
    )
    position_share: float = Field(
        0.5, ge=0, le=1, description="share of positions that are image patches, for FLOPs"
    )

    @model_validator(mode="after")
    def _fits(self) -> ImageConfig:
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        if self.stem == "unet" and self.patch != 2:
            raise ValueError(
                f"the U-Net halves latents once, so patch is 2 with it, not {self.patch}"
            )
        if self.first_limit is not None and self.first_limit > self.timesteps:
            raise ValueError(
                f"first_limit {self.first_limit} is above the {self.timesteps} timesteps"
            )
        return self

    @property
    def has_position_table(self) -> bool:
        return self.stem == "linear" if self.position_table is None else self.position_table

    @property
    def side(self) -> int:
        """Patches in a row or column of an image."""
        return self.size // self.patch

    @property
    def positions(self) -> int:
        """Positions that an image takes."""
        return self.side**2

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch**2

    def debug_size(self) -> ImageConfig:
        """The same with a small U-Net; latents keep their shape, which is the data's."""
        unet = self.unet
        if unet.outer_width > DEBUG_UNET_WIDTH:
            unet = UNetConfig(
                outer_width=DEBUG_UNET_WIDTH,
                inner_width=2 * DEBUG_UNET_WIDTH,
                blocks=1,
                groups=8,
                head_width=16,
            )
        return self.model_copy(update={"unet": unet, "time_width": min(self.time_width, 64)})

    def count_parameters(self, d_model: int) -> int:
        """Parameters of the stem, way in and way out."""
        time = d_model if self.stem == "linear" else self.unet.inner_width
        total = self.time_width * time + time + time * time + time
        if self.has_position_table:
            total += 2 * self.side * d_model
        if self.stem == "linear":
            p, out = self.patch_values, d_model * (2 if self.skip else 1)
            return total + p * d_model + d_model + out * p + p
        return total + self._count_unet(d_model, time)

    def _count_unet(self, d_model: int, time: int) -> int:
        u, c = self.unet, self.channels
        w, v = u.outer_width, u.inner_width

        def conv(a: int, b: int, side: int = 3) -> int:
            return a * b * side**2 + b

        def block(a: int, b: int) -> int:
            return 2 * a + conv(a, b) + time * b + b + 2 * b + conv(b, b) + (a != b) * conv(a, b, 1)

        attention = 2 * v + 4 * (v * v + v)
        down = (
            conv(c, w) + u.blocks * block(w, w) + conv(w, v) + u.blocks * (block(v, v) + attention)
        )
        down += conv(v, d_model, 1)
        up = conv(d_model * (2 if self.skip else 1), v, 1)
        up += u.blocks * (block(2 * v, v) + attention) + conv(v, w) + u.blocks * block(2 * w, w)
        return down + up + 2 * w + conv(w, c)

    def flops_per_position(self, d_model: int) -> float:
        """Forward FLOPs of the stem, both ways, for one patch position."""
        p, out = self.patch_values, d_model * (2 if self.skip else 1)
        if self.stem == "linear":
            return 2.0 * (p * d_model + out * p)
        u, c, area = self.unet, self.channels, self.patch**2
        w, v = u.outer_width, u.inner_width
        outer = 9 * (c * w + 2 * u.blocks * w * w + u.blocks * 3 * w * w + c * w)
        outer += u.blocks * 2 * w * w
        inner = 9 * (2 * u.blocks * v * v + u.blocks * 3 * v * v) + u.blocks * 2 * v * v
        inner += 9 * w * v + 2 * u.blocks * (4 * v * v + 2 * v * self.positions)
        inner += v * d_model + out * v
        # The convolution on the way up runs at the outer size.
        return 2.0 * (area * (outer + 9 * v * w) + inner)


class MultimodalConfig(Section):
    """What every such family has; a family's `Config` adds its backbone."""

    vocab_size: int = Field(
        65536, gt=0, description="rows of the embedding table and of the output head"
    )
    d_model: int = Field(2048, gt=0, description="width of the residual stream")
    modalities: tuple[str, ...] = Field(
        ("text",), description="modalities with weights of their own, text first"
    )
    image: ImageConfig | None = Field(
        None, description="continuous images and their denoising loss; null is codes, or no images"
    )
    special_ids: tuple[int, ...] = Field(
        (),
        description="ids with embeddings in a table of their own, beyond the vocabulary if need be (BOI, EOI of a frozen base)",
    )
    tie_embeddings: bool = Field(False, description="the output head is the embedding table")
    z_loss: float = Field(0.0, ge=0, description="factor on mean(logsumexp(logits)^2)")
    loss_chunk_tokens: int | None = Field(
        None,
        gt=0,
        description="compute logits and loss for this many positions at a time; null is all at once",
    )

    @field_validator("modalities")
    @classmethod
    def _known_modalities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in MODALITIES]
        if unknown:
            raise ValueError(
                f"there is no modality {unknown[0]!r}; there is {', '.join(MODALITIES)}"
            )
        if value[:1] != ("text",) or len(set(value)) < len(value):
            raise ValueError(f"modalities are {', '.join(value)}; name each once, text first")
        return value

    @model_validator(mode="after")
    def _has_modality_of_images(self) -> MultimodalConfig:
        if self.image is not None and "image" not in self.modalities:
            raise ValueError(
                f"model.image is set and model.modalities is {', '.join(self.modalities)}; add image to it"
            )
        return self

    @property
    def id_modalities(self) -> tuple[str, ...]:
        """Modalities whose positions are ids, in order."""
        return tuple(m for m in self.modalities if self.image is None or m != "image")

    def shared_debug_size(self) -> dict[str, Any]:
        """Changes that make what all families share small, for a family's `debug_size`."""
        small: dict[str, Any] = {}
        if self.image is not None:
            small["image"] = self.image.debug_size()
        if self.loss_chunk_tokens:
            small["loss_chunk_tokens"] = min(self.loss_chunk_tokens, 256)
        return small

    def count_shared_parameters(self) -> dict[str, int]:
        """Exact counts of what stands around the backbone."""
        counts = {
            "embedding": self.vocab_size * self.d_model,
            "special": len(self.special_ids) * self.d_model,
            "image_stem": 0 if self.image is None else self.image.count_parameters(self.d_model),
            "head": 0 if self.tie_embeddings else self.vocab_size * self.d_model,
        }
        return {name: count for name, count in counts.items() if count or name == "embedding"}

    def shared_forward_flops(self) -> float:
        """Forward FLOPs a position of head and stem: patches have no head, and ids no stem."""
        head = 2.0 * self.vocab_size * self.d_model
        if self.image is None:
            return head
        share, stem = self.image.position_share, self.image.flops_per_position(self.d_model)
        return (1 - share) * head + share * stem
