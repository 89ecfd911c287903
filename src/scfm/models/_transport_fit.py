"""Training of the codec and of the transports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from .. import _logging
from ..tasks.panel_codec import LinearCodec, train_codec
from ..tasks.transport import CodeScale, TransportMap, start_from_identity, train_transport
from ..train._adapters import changed
from ._split_column import parts_of
from ._training import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scipy.sparse import csr_matrix
    from torch import Tensor

    from ..tasks.panel_codec import CodecTraining
    from ..tasks.transport import TransportTraining


class TransportFit:
    """The steps of ``train``."""

    def _parts(self, labels: np.ndarray, validation_size: float, test_size: float, seed: int) -> np.ndarray:
        if min(validation_size, test_size) < 0 or validation_size + test_size >= 1:
            msg = f"validation_size={validation_size} and test_size={test_size} are no shares that leave cells to train on"
            raise ValueError(msg)
        key = self._arguments["split_key"]
        parts = np.full(len(labels), "train", dtype=object) if key is None else parts_of(self.adata, key)
        parts[labels == ""] = ""
        drawn = {"validation": validation_size, "test": test_size if key is None else 0.0}
        if "validation" in set(parts):
            drawn = {}
        rng = np.random.default_rng(seed)
        for name in sorted(set(labels) - {""}):
            left = members = rng.permutation(np.flatnonzero((labels == name) & (parts == "train")))
            for part, share in drawn.items():
                n = round(share * len(members))
                parts[left[:n]], left = part, left[n:]
        return parts

    def _train_codec(
        self,
        cells: Callable[[np.ndarray], Tensor],
        expression: csr_matrix,
        rows: Mapping[str, np.ndarray],
        training: CodecTraining,
        show: bool,
    ) -> None:
        if self._made["space"] == "pca":
            self.module["codec"] = LinearCodec.fitted(expression[rows["train"]], self._made["latent"]).to(self._place)
            return
        start = _logging.info(f"training the encoder and decoder on {len(rows['train']):,} cells")
        network = self.backbone.module if self._made["fine_tune"] else None
        if network is not None:
            network.requires_grad_(requires_grad=True)
        epochs = train_codec(
            self.module["codec"], cells, expression, rows["train"], rows["validation"], training, network=network
        )
        try:
            table = list(tqdm(epochs, total=training.max_epochs, desc="codec", disable=not show, leave=False))
        finally:
            epochs.close()
            self.module.eval()
            if network is not None:
                network.eval().requires_grad_(requires_grad=False)
                changed(self.backbone)
        history = pd.DataFrame(table).rename_axis("epoch").drop(columns="kept", errors="ignore")
        self.history_ = joined(self.history_, {name: history[[name]] for name in history})
        _logging.info("    finished", time=start)

    def _train_transports(
        self,
        cells: Callable[[np.ndarray], Tensor],
        labels: np.ndarray,
        rows: Mapping[str, np.ndarray],
        training: TransportTraining,
        show: bool,
        *,
        standardize: bool,
        start_steps: int,
    ) -> None:
        codes = {part: (self._codes(cells, rows[part]), labels[rows[part]]) for part in ("train", "validation")}
        dim = codes["train"][0].shape[1]
        units = CodeScale.of(codes["train"][0]) if standardize else CodeScale(torch.zeros(dim), torch.ones(()))
        self.module["units"] = units.to(self._place)
        codes = {part: (units(values), names) for part, (values, names) in codes.items()}

        def of(part: str, name: str) -> Tensor:
            values, names = codes[part]
            return values[torch.from_numpy(np.flatnonzero(names == name)).to(values.device)]

        control = self._arguments["control"]
        self.module["transports"], self._learned = nn.ModuleList(), []
        for number, name in enumerate(self._treatments):
            source, target = of("train", control), of("train", name)
            if not len(target):
                _logging.warning(f"no cell of {name!r} is trained on; its effect cannot be predicted")
                continue
            held_out = of("validation", control), of("validation", name)
            if not all(map(len, held_out)):
                _logging.warning(f"no cells of {name!r} or no controls to validate on; the last step counts")
                held_out = None
            begun = _logging.info(f"moving {len(source):,} control cells to {len(target):,} cells of {name!r}")
            transport = TransportMap(dim, self._made["potential"], seed=self._made["seed"] + number).to(self._place)
            start_from_identity(
                transport,
                torch.cat([source, target]),
                n_steps=start_steps,
                batch_size=training.batch_size,
                seed=training.seed,
            )
            steps = train_transport(transport, source, target, training, held_out=held_out)
            try:
                n_rows = -(-training.max_iter // training.check_every)
                table = list(tqdm(steps, total=n_rows, desc=str(name), disable=not show, leave=False))
            finally:
                steps.close()
            transport.eval().requires_grad_(requires_grad=False)
            self.module["transports"].append(transport)
            self._learned.append(str(name))
            history = pd.DataFrame(table).set_index("iteration").drop(columns="kept", errors="ignore")
            self.history_ = dict(self.history_ or {}) | {f"{column}_{name}": history[[column]] for column in history}
            _logging.info("    finished", time=begun)
        if not self._learned:
            msg = "no treatment has cells to train on; look at split_key="
            raise ValueError(msg)
