"""vLLM's CPU worker with the Jacobi sampler, for tests."""

from vllm.v1.worker.cpu_worker import CPUWorker

from cllm.vllm.jacobi_worker import JacobiHooks


class CpuJacobiWorker(JacobiHooks, CPUWorker):  # type: ignore[misc]
    pass
