"""`DeviceState` on a GPU: one launch where torch takes some twenty."""

import torch
import triton

from cllm.engine.kernels.state import accept_kernel, window_kernel
from cllm.engine.state import DeviceState, Places

_TABLE_ENTRIES = 256  # of a table, copied at a time


class TritonState(DeviceState):
    """The state with a step's own two methods as kernels; what happens between steps stays plain torch."""

    def window(self, slots_B: torch.Tensor, width: int, num_blocks: int) -> tuple[torch.Tensor, Places]:
        batch, new = len(slots_B), self.tokens_RL.new_empty
        window_BW, positions_BW, stored_BW = (new(batch, width) for _ in range(3))
        starts_B, tables_BM = new(batch, dtype=torch.int32), new(batch, num_blocks, dtype=torch.int32)
        window_kernel[(batch,)](
            slots_B,
            self.tokens_RL,
            self.tables_RM,
            self.length_R,
            window_BW,
            starts_B,
            positions_BW,
            stored_BW,
            tables_BM,
            slots_B.stride(0),
            self.tokens_RL.shape[1],
            self.tables_RM.shape[1],
            num_blocks,
            BLOCK_TOKENS=self.block_tokens,
            WIDTH=width,
            BLOCK_W=triton.next_power_of_2(width),
            BLOCK_M=_TABLE_ENTRIES,
            num_warps=4,
        )
        return window_BW, Places(starts_B, positions_BW, stored_BW, tables_BM)

    def accept(self, slots_B: torch.Tensor, window_BW: torch.Tensor, predictions_BW: torch.Tensor) -> torch.Tensor:
        batch, width = window_BW.shape
        result_BX = window_BW.new_empty(batch, 1 + width)
        accept_kernel[(batch,)](
            slots_B,
            window_BW,
            predictions_BW.contiguous(),
            self.tokens_RL,
            self.length_R,
            self.limit_R,
            self.block_end_R,
            self.block_size_R,
            result_BX,
            slots_B.stride(0),
            window_BW.stride(0),
            self.tokens_RL.shape[1],
            WIDTH=width,
            BLOCK_W=triton.next_power_of_2(width),
            num_warps=1,
        )
        return result_BX
