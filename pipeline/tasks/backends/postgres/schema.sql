-- The tables and functions of durable tasks, version 1. They stand beside those of procrastinate, in the same database.
--
-- The rule kept here: whoever changes a task holds the lock of its row, and a worker names the attempt that it is at.
-- One that was taken for dead names an old attempt, and changes nothing. Locks are taken on the task first, then on its job.

create table penstock_schema (
    version integer not null
);
insert into penstock_schema values (1);

create table penstock_tasks (
    id bigint generated always as identity primary key,
    app text not null,
    name text not null,
    key text not null,                              -- what users call its id
    queue text not null,
    run integer not null default 1,                 -- counts how often this key was submitted
    attempt integer not null default 1,             -- counts within a run, and is the fencing number
    state text not null default 'queued' check (
        state in ('queued', 'running', 'cancelling', 'error', 'cancelled', 'timed_out', 'completed')
    ),
    payload json not null,
    timeout double precision,                       -- seconds for one attempt
    max_attempts integer not null,
    lost integer not null default 0,                -- attempts whose worker was lost
    retried integer not null default 0,             -- attempts that have failed, and were to be done again
    saved json,
    reasons jsonb not null default '[]',            -- why it is asked to stop, in order
    first_seq bigint not null default 1,            -- of the events of this run
    seq bigint not null default 0,                  -- that of the newest event
    job bigint,                                     -- procrastinate's job of this attempt
    worker text,
    presence integer,                               -- the advisory lock that its worker holds as long as it lives
    beat timestamp with time zone,                  -- when its worker was last heard of
    created timestamp with time zone not null default now(),
    started timestamp with time zone,
    ended timestamp with time zone,
    unique (app, name, key)
);
create index penstock_tasks_running on penstock_tasks (id) where state in ('running', 'cancelling');
create index penstock_tasks_queued on penstock_tasks (id) where state = 'queued';
create index penstock_tasks_listed on penstock_tasks ((ended is null) desc, created desc);
create index penstock_tasks_ended on penstock_tasks (ended) where ended is not null;

create table penstock_events (
    task bigint not null references penstock_tasks on delete cascade,
    seq bigint not null,
    run integer not null,
    type text not null,
    at double precision not null,                   -- seconds since the epoch
    data json not null,
    primary key (task, seq)
);
create unique index penstock_events_terminal on penstock_events (task, run)
    where type in ('error', 'cancelled', 'timed_out', 'completed');
create index penstock_events_newest on penstock_events (task, type, seq) where type in ('progress', 'started');

-- End the job of a task, if it has not ended.
create function penstock_end_job(p_job bigint, p_status procrastinate_job_status) returns void language plpgsql as $$
begin
    perform from procrastinate_jobs where id = p_job and status in ('todo', 'doing') for update;
    if found then
        perform procrastinate_finish_job_v1(p_job, p_status, false);
    end if;
end
$$;

-- Add events of one attempt, and what it has saved. With a job's status the last event is terminal and ends the task.
-- The outcome is 'written', or 'superseded' when this attempt is no longer the current one, or 'reasons' when the task was
-- to end and there are reasons to stop that the worker has not heard of: then nothing is written.
-- A call that is repeated, because its answer was lost, is 'written' once.
create function penstock_write(
    p_task bigint, p_run integer, p_attempt integer, p_seq bigint,
    p_types text[], p_at double precision[], p_data json[],
    p_saved json, p_heard integer, p_status procrastinate_job_status,
    out outcome text, out reasons jsonb
) language plpgsql as $$
declare
    t penstock_tasks;
    n constant integer := coalesce(array_length(p_types, 1), 0);
begin
    select * into t from penstock_tasks where id = p_task and run = p_run and attempt = p_attempt for update;
    if not found then
        outcome := 'superseded';
        return;
    end if;
    reasons := t.reasons;
    if n > 0 and t.seq = p_seq + n and exists (
        select from penstock_events where task = p_task and seq = t.seq and type = p_types[n] and at = p_at[n]
    ) then
        outcome := 'written';
    elsif t.state not in ('running', 'cancelling') or t.seq <> p_seq then
        outcome := 'superseded';
    elsif p_status is not null and jsonb_array_length(t.reasons) > p_heard then
        outcome := 'reasons';
    else
        insert into penstock_events (task, seq, run, type, at, data)
            select p_task, p_seq + e.n, p_run, e.type, e.at, e.data
            from unnest(p_types, p_at, p_data) with ordinality as e (type, at, data, n);
        update penstock_tasks set
            seq = p_seq + n,
            saved = coalesce(p_saved, saved),
            beat = now(),
            state = case when p_status is null then state else p_types[n] end,
            ended = case when p_status is null then null else now() end,
            presence = case when p_status is null then presence end
        where id = p_task;
        if p_status is not null then
            perform penstock_end_job(t.job, p_status);
        end if;
        perform pg_notify('penstock', p_task::text);
        outcome := 'written';
    end if;
end
$$;

-- End a task that nobody works on, and its job.
create function penstock_end(p_task bigint, p_type text, p_data json, p_status procrastinate_job_status)
returns void language plpgsql as $$
declare
    t penstock_tasks;
begin
    update penstock_tasks set state = p_type, ended = now(), seq = seq + 1, presence = null
        where id = p_task and state in ('queued', 'running', 'cancelling') returning * into t;
    if found then
        insert into penstock_events (task, seq, run, type, at, data)
            values (p_task, t.seq, t.run, p_type, extract(epoch from clock_timestamp()), p_data);
        perform penstock_end_job(t.job, p_status);
        perform pg_notify('penstock', p_task::text);
    end if;
end
$$;

-- End a task as cancelled, or timed out, with the reasons that it has.
create function penstock_end_cancelled(p_task bigint, p_note text) returns void language plpgsql as $$
declare
    r jsonb;
    d jsonb;
begin
    select reasons into r from penstock_tasks where id = p_task;
    d := jsonb_build_object('message', r->0->'message', 'reasons', r);
    if p_note is not null then
        d := d || jsonb_build_object('note', p_note);
    end if;
    perform penstock_end(
        p_task, case r->0->>'cancel_type' when 'timeout' then 'timed_out' else 'cancelled' end, d::json, 'aborted'
    );
end
$$;

-- Ask a task to stop: 'unknown', 'over', 'ended' when nobody had begun it, else 'asked'. The reason is one of CancelReason.to_dict().
create function penstock_ask(p_app text, p_name text, p_key text, p_reason jsonb) returns text language plpgsql as $$
declare
    t penstock_tasks;
begin
    select * into t from penstock_tasks where app = p_app and name = p_name and key = p_key for update;
    if not found then
        return 'unknown';
    elsif t.state not in ('queued', 'running', 'cancelling') then
        return 'over';
    end if;
    update penstock_tasks set
        reasons = case when jsonb_array_length(reasons) < 100 then reasons || jsonb_build_array(p_reason) else reasons end,
        state = case state when 'running' then 'cancelling' else state end
    where id = t.id;
    if t.job is not null then
        perform procrastinate_cancel_job_v1(t.job, true, false);
    end if;
    if t.state = 'queued' then
        perform penstock_end_cancelled(t.id, null);
        return 'ended';
    end if;
    perform pg_notify('penstock', t.id || ' asked');
    return 'asked';
end
$$;

-- The same for people in psql: select penstock_cancel('app', 'name', 'id', 'why');
create function penstock_cancel(p_app text, p_name text, p_key text, p_message text default 'cancelled by hand', p_code text default null)
returns boolean language sql as $$
    select penstock_ask(p_app, p_name, p_key, jsonb_build_object(
        'message', p_message, 'cancel_type', 'manual', 'code', p_code, 'origin', 'penstock_cancel',
        'at', extract(epoch from clock_timestamp()), 'causes', '[]'::jsonb
    )) in ('ended', 'asked');
$$;
