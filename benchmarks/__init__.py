"""What things cost, beside plain hooks and the other tools: one script for one question.

python -m benchmarks                        # all of them: tables; plots and JSON files in `benchmarks/results`
python -m benchmarks overhead cache --quick
python benchmarks/overhead.py               # one of them

`timing` measures, `report` shows, `question` is the command line that the scripts share, `models` has the models.
"""
