"""Neuron pages: what neurons and heads do at every token of chosen prompts, as one HTML file that needs no network."""

from safety_lens.report.pages.page import LARGE, NeuronPage, PagePrompt, neuron_page

__all__ = ["LARGE", "NeuronPage", "PagePrompt", "neuron_page"]
