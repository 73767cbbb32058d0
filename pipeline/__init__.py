"""What the tasks do. Imports go one way: core, engines, inputs, image, then the others."""

import os

# A git hook, `rebase --exec` or push-to-deploy sets these to the user's repository, and each git
# that a task starts would change that one (https://git-scm.com/docs/githooks#_description). Not
# GIT_CONFIG_COUNT and GIT_CONFIG_PARAMETERS: they are settings, such as how to sign in.
for variable in (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NAMESPACE",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_QUARANTINE_PATH",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
):
    os.environ.pop(variable, None)
