"""Who submitted a job: the name of its API key."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("submitted_by", sa.String(length=64), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "submitted_by")
