"""What a job may name: every component of this package, by its exact class path.

Sites allow these and nothing else of ours. FLARE calls *anything callable* that a site's list reaches, with
the job's arguments, so a prefix such as ``nvflare_llm_components.`` would open each function and each name
that a module imports.
"""

COMPONENTS = (
    "nvflare_llm_components.aggregators.CoordinateMedian",
    "nvflare_llm_components.aggregators.NormClippedMean",
    "nvflare_llm_components.aggregators.OrderedAverage",
    "nvflare_llm_components.aggregators.TrimmedMean",
    "nvflare_llm_components.executors.HFSFTExecutor",
    "nvflare_llm_components.filters.PrecisionDequantizeFilter",
    "nvflare_llm_components.filters.PrecisionQuantizeFilter",
    "nvflare_llm_components.persistors.SafetensorsModelLocator",
    "nvflare_llm_components.persistors.SafetensorsModelPersistor",
    "nvflare_llm_components.server_model.SafetensorsModule",
    "nvflare_llm_components.widgets.EarlierRunState",
    "nvflare_llm_components.widgets.QuorumMember",
    "nvflare_llm_components.widgets.RoundLog",
    "nvflare_llm_components.workflows.FinalEvaluation",
    "nvflare_llm_components.workflows.QuorumFedAvg",
)
