"""JupyterLab as `make lab` starts it: a notebook is clean whenever it is saved (nbdev), and nothing is asked of the network. Your own configuration goes first."""

c = get_config()  # noqa: F821 (Jupyter's)
c.ContentsManager.pre_save_hook = "nbdev.clean.clean_jupyter"
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.news_url = None
