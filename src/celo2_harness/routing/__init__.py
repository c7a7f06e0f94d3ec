"""Which parameter goes where: labels, matrix views and the printed report.

A tree is brought into one form (`leaves`: names, classes, boxes; `neighbours`: weights and their biases; `stacks`: how
many layers lie in one array), then every leaf is decided as the array of one layer (`layouts`: its input and output
axes; `rules`: its label, the user's rules in front), and stacked axes come back as batch axes (`routes`).
"""

from celo2_harness.routing.leaves import Leaf as Leaf
from celo2_harness.routing.muon import rules_of_dimension_numbers as rules_of_dimension_numbers
from celo2_harness.routing.report import (
    ReportRow as ReportRow,
    format_report as format_report,
    format_view as format_view,
)
from celo2_harness.routing.routes import (
    Route as Route,
    label_params as label_params,
    route as route,
    view_params as view_params,
    warn_if_nothing_hidden as warn_if_nothing_hidden,
)
from celo2_harness.routing.rules import BUILT_IN as BUILT_IN, LABELS as LABELS, ROLES as ROLES, Rule as Rule
from celo2_harness.routing.user_rules import RuleLike as RuleLike
