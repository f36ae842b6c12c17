"""The paper's experiments: methods side by side on its four data sets, studies, and a report (``bench/suite.py``)."""
