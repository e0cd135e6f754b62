"""An ablation by itself as Markdown: the report's sections about it, with the figure of its effects."""

from cllm.ablation.document import AblationDocument
from cllm.ablation.summary import sentences
from cllm.report.ablation_sections import ablation_sections
from cllm.report.page import Section, as_markdown
from cllm.report.sources import Sources, sources_section


def ablation_page(ablation: AblationDocument, figure: str) -> str:
    """The page. `figure` is the name of the image file beside it; there is one where there are effects."""
    base, sources = ablation.base, Sources.of(ablations=[ablation])
    centre = ", ".join(f"{name}={setting}" for name, setting in base.settings.items())
    summary = [
        f"{len(ablation.rows)} students of the run `{base.recipe}`, each from its teacher; {base.metric} over "
        f"{base.num_prompts} held-out prompts. Centre: {centre}."
    ]
    if ablation.missing:
        summary += [f"{len(ablation.missing)} students are missing:", _list(ablation.missing)]
    if ablation.effects:
        summary += [_list(sentences(ablation.effects)), f"![Main effects]({figure})"]
    sections = [one for one in ablation_sections([ablation], sources) if isinstance(one, Section)]
    return as_markdown(f"Ablation {ablation.grid}", summary, [*sections, sources_section(sources)])


def _list(lines: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
