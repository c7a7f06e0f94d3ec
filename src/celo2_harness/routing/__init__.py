"""Which parameter goes where: labels, matrix views and the printed report.

`_leaves` reads names and shapes off a tree, `_layouts` says which axes of a weight are inputs and outputs, `_rules` is
the ordered table of labels with the user's rules in front, `_route` applies it to a tree, `_report` prints the result.
"""

from celo2_harness.routing._leaves import Leaf as Leaf
from celo2_harness.routing._muon import rules_of_dimension_numbers as rules_of_dimension_numbers
from celo2_harness.routing._report import ReportRow as ReportRow
from celo2_harness.routing._report import format_report as format_report
from celo2_harness.routing._report import format_view as format_view
from celo2_harness.routing._route import Route as Route
from celo2_harness.routing._route import label_params as label_params
from celo2_harness.routing._route import route as route
from celo2_harness.routing._route import view_params as view_params
from celo2_harness.routing._rules import BUILT_IN as BUILT_IN
from celo2_harness.routing._rules import LABELS as LABELS
from celo2_harness.routing._rules import ROLES as ROLES
from celo2_harness.routing._rules import Rule as Rule
from celo2_harness.routing._rules import RuleLike as RuleLike
