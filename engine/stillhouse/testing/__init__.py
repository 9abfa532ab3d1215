"""The conformance kit: what plugin authors run.

In a package's tests::

    from stillhouse.testing import parametrize_with_checks

    @parametrize_with_checks(MyMethod)
    def test_conformance(check):
        check()

On the command line: ``stillhouse plugins check NAME``. What a plugin can't do it declares, with the reason, in
``Method.conformance`` (see ``stillhouse.api.Conformance``); such a failure is expected, and its absence an error.
"""

from stillhouse.testing.checks import Check, CheckFailure, NotApplicable, Outcome, checks_for, outcomes
from stillhouse.testing.pytest_support import parametrize_with_checks, subject_of
from stillhouse.testing.rig import Subject, toy_student, toy_teacher
from stillhouse.testing.toys import ToyNet, ToyStudent, ToyTeacher, toy_splits

__all__ = [
    "Check",
    "CheckFailure",
    "NotApplicable",
    "Outcome",
    "Subject",
    "ToyNet",
    "ToyStudent",
    "ToyTeacher",
    "checks_for",
    "outcomes",
    "parametrize_with_checks",
    "subject_of",
    "toy_splits",
    "toy_student",
    "toy_teacher",
]
