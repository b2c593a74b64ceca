"""axolotl's slot for the door: `plugins: [padfree_patch.integrations.axolotl.PadfreePlugin]` in its config."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin

from ..door.hooks import Autopatch, autopatch


class PadfreePlugin(BasePlugin):
    """Calls `padfree_patch.autopatch()` before axolotl loads its first model; its `sample_packing` packs the rows."""

    handle: Autopatch | None = None

    def pre_model_load(self, cfg: object) -> None:
        if self.handle is None:
            self.handle = autopatch()

    def post_train_unload(self, cfg: object) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
