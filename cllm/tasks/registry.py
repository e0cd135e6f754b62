"""All tasks by name: the recipe's `task` section picks one."""

from typing import Annotated

from pydantic import Field

from cllm.tasks.base import Task
from cllm.tasks.codesearchnet import CodeSearchNet, CodeSearchNetConfig
from cllm.tasks.gsm8k import Gsm8k, Gsm8kConfig
from cllm.tasks.humaneval import HumanEval, HumanEvalConfig
from cllm.tasks.mt_bench import MtBench, MtBenchConfig
from cllm.tasks.sharegpt import ShareGpt, ShareGptConfig
from cllm.tasks.spec_bench import SpecBench, SpecBenchConfig
from cllm.tasks.spider import Spider, SpiderConfig
from cllm.tasks.synthetic_sql import SyntheticSql, SyntheticSqlConfig

TaskConfig = Annotated[
    SyntheticSqlConfig
    | SpiderConfig
    | Gsm8kConfig
    | CodeSearchNetConfig
    | HumanEvalConfig
    | ShareGptConfig
    | MtBenchConfig
    | SpecBenchConfig,
    Field(discriminator="name"),
]


def load_task(config: TaskConfig) -> Task:
    """The task that `config` describes. Data is read by `Task.examples`, not here."""
    match config:
        case SyntheticSqlConfig():
            return SyntheticSql(config)
        case SpiderConfig():
            return Spider(config)
        case Gsm8kConfig():
            return Gsm8k(config)
        case CodeSearchNetConfig():
            return CodeSearchNet(config)
        case HumanEvalConfig():
            return HumanEval(config)
        case ShareGptConfig():
            return ShareGpt(config)
        case MtBenchConfig():
            return MtBench(config)
        case SpecBenchConfig():
            return SpecBench(config)
