"""Any order of submit, claim, heartbeat, crash, cancel, pause, resume and replay keeps the store's promises."""

import tempfile
from pathlib import Path

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from bento_service.errors import ClientIdConflict, TransitionRefused
from bento_service.jobs.job import TRANSITIONS, JobError, JobStatus, Lease
from bento_service.jobs.store import LeaseLost, Store
from bento_service.training.events import TrainerEvent
from tests.job_factory import make_file, make_job

ENDS = [
    JobStatus.SUCCEEDED,
    JobStatus.FAILED,
    JobStatus.CANCELLED,
    JobStatus.PAUSED,
    JobStatus.QUEUED,
]


class StoreMachine(RuleBasedStateMachine):
    leases = Bundle("leases")  # every lease ever handed out, most of them over

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store.open(f"sqlite:///{Path(self.folder.name) / 'trl.db'}")
        self.file = self.store.add_file(make_file())
        self.clients = {}  # client id → (job id, beta)
        self.jobs = []
        self.holder = {}  # job id → the one lease that may write
        self.recorded = {}  # job id → trainer events carried
        self.ended = {}  # job id → terminal status

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    def pick(self, number):
        return self.jobs[number % len(self.jobs)] if self.jobs else None

    @rule(client=st.sampled_from([None, "a", "b"]), beta=st.sampled_from([0.1, 0.5]), priority=st.integers(-1, 1))
    def submit(self, client, beta, priority):
        job = make_job(self.file.id, options={"client_id": client, "priority": priority}, beta=beta)
        known = self.clients.get(client)
        try:
            stored, created = self.store.create_job(job)
        except ClientIdConflict:
            assert known is not None and known[1] != (beta, priority)
            return
        assert created == (known is None)
        assert stored.id == (job.id if created else known[0])
        if created:
            self.jobs.append(job.id)
            if client is not None:
                self.clients[client] = (job.id, (beta, priority))

    @rule(target=leases)
    def claim(self):
        queued = [self.store.get_job(j) for j in self.jobs]
        queued = [j for j in queued if j.status is JobStatus.QUEUED]
        job = self.store.claim("owner", host="host", free_devices=1, lease_seconds=60)
        if not queued:
            assert job is None
            return Lease(job_id="ftjob-none", token=0)
        assert job.id == min(queued, key=lambda j: j.queue_position).id
        return self.hold(job.id, job.lease_token)

    @rule(target=leases, number=st.integers(0, 99))
    def crash_and_adopt(self, number):
        """The holder dies or sleeps; another takes over. The old lease stays around and may come back."""
        job_id = self.pick(number)
        old = self.holder.get(job_id)
        if old is None:
            return Lease(job_id="ftjob-none", token=0)
        lease = self.store.adopt(job_id, "other", lease_seconds=60, from_token=old.token)
        assert self.store.adopt(job_id, "third", lease_seconds=60, from_token=old.token) is None
        return self.hold(job_id, lease.token)

    def hold(self, job_id, token):
        self.holder[job_id] = Lease(job_id=job_id, token=token)
        return self.holder[job_id]

    @rule(lease=leases)
    def heartbeat(self, lease):
        self.write(lease, lambda: self.store.heartbeat(lease, lease_seconds=60))

    @rule(lease=leases)
    def record(self, lease):
        count = self.recorded.get(lease.job_id, 0)
        event = TrainerEvent(seq=count + 1, time=1.0, type="metrics", message="m", data={"step": count + 1})
        if self.write(lease, lambda: self.store.record(lease, [event], offset=count + 1)):
            self.recorded[lease.job_id] = count + 1

    @rule(lease=consumes(leases), to=st.sampled_from(ENDS))
    def finish(self, lease, to):
        error = JobError(code="c", message="m") if to is JobStatus.FAILED else None
        if self.write(lease, lambda: self.store.finish(lease, to, "ended", error=error)):
            del self.holder[lease.job_id]

    def write(self, lease, action):
        """A write succeeds exactly for the one lease that holds the job."""
        valid = self.holder.get(lease.job_id) == lease
        if lease.job_id == "ftjob-none":
            return False
        try:
            action()
        except LeaseLost:
            assert not valid
            return False
        assert valid
        return True

    @rule(number=st.integers(0, 99), wanted=st.sampled_from(["cancel", "pause"]))
    def stop(self, number, wanted):
        if (job_id := self.pick(number)) is None:
            return
        before = self.store.get_job(job_id)
        target = JobStatus.CANCELLED if wanted == "cancel" else JobStatus.PAUSED
        try:
            after = self.store.request_stop(job_id, wanted)
        except TransitionRefused:
            assert target not in TRANSITIONS[before.status]
            return
        if before.status is JobStatus.RUNNING:
            assert after.wanted == ("cancel" if "cancel" in (wanted, before.wanted) else "pause")
        else:
            assert after.status is target

    @rule(number=st.integers(0, 99))
    def resume(self, number):
        if (job_id := self.pick(number)) is None:
            return
        before = self.store.get_job(job_id)
        try:
            after = self.store.resume(job_id)
        except TransitionRefused:
            assert before.status is not JobStatus.PAUSED
            return
        assert after.status in (JobStatus.QUEUED, JobStatus.RUNNING)

    @invariant()
    def history_is_whole_and_legal(self):
        positions = []
        for job_id in self.jobs:
            job = self.store.get_job(job_id)
            events = self.store.list_events(job_id, order="asc", limit=10000).data
            assert [e.seq for e in events] == list(range(1, len(events) + 1))
            status = None
            for event in (e for e in events if e.type == "state"):
                assert event.data.get("from") == (None if status is None else status.value)
                following = JobStatus(event.data["to"])
                assert status is None or following in TRANSITIONS[status]
                status = following
            assert job.status is status
            assert len([e for e in events if e.type == "metrics"]) == self.recorded.get(job_id, 0)
            assert (job.status is JobStatus.RUNNING) == (job_id in self.holder)
            assert job.wanted is None or job.status is JobStatus.RUNNING
            assert self.ended.get(job_id, job.status) is job.status
            if job.status.is_terminal:
                self.ended[job_id] = job.status
            if job.queue_position is not None:
                positions.append(job.queue_position)
        assert sorted(positions) == list(range(1, len(positions) + 1))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = hypothesis_settings(max_examples=25, stateful_step_count=30, deadline=None)
