"""JupyterLab as `make lab` starts it: a notebook is clean whenever it is saved, and nothing is asked of the network. Your own configuration goes first."""

from pathlib import Path

from nbdev.clean import clean_jupyter


def clean(path, model, **more):
    "nbdev's cleaning, and no views of widgets: without this kernel they show nothing."
    clean_jupyter(path=path if Path(path).exists() else None, model=model, **more)  # nbdev trusts the file, and a new one is none yet
    if model["type"] == "notebook":
        for cell in model["content"]["cells"]:
            if "outputs" in cell:
                cell["outputs"] = [o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]


c = get_config()  # noqa: F821 (Jupyter's)
c.ContentsManager.pre_save_hook = clean
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.news_url = None
