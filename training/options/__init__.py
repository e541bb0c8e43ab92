"""Options as data: dataclasses by topic, the rule that reads what each option says of itself, recipes, the parser."""
