/* `delete`: the end of the processes, the control groups, the files, then the poststop hooks. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "hook.h"
#include "lean.h"

#define END_MS 10000
#define MONITOR_MS 2000

/* The specification: a hook that fails is warned of, and the others run. */
static void run_poststop(const struct container *c) {
    static struct hook_result result;
    size_t size;
    uint32_t done = 0;
    const char *frame = record_bytes(&c->record, RECORD_POSTSTOP, &size);
    lean_step_begin(STEP_POSTSTOP);
    while (size > 0 &&
           hook_run_after(frame, size, done, 0, c->lean->envp, &result) < 0) {
        done = result.failed;
        lean_warning(c->lean, "error running poststop hook #%u: %s", done - 1, result.text);
    }
    lean_step_end(STEP_POSTSTOP);
}

static int end_processes(const struct container *c) {
    (void)lean_signal(c, SIGKILL);
    if (lean_wait_end(c->init_pidfd, END_MS))
        return LEAN_DONE;
    lean_error(c->lean, "container init still running");
    return LEAN_FAILED;
}

static int destroy(const struct container *c) {
    /* Where processes were not bound to init's life, some may be left. */
    if (!(c->record.head.flags & RECORD_PIDNS))
        (void)cgroup_kill_all(&c->record);
    if (cgroup_frozen(&c->record))
        cgroup_thaw(&c->record);
    lean_step_begin(STEP_REMOVE_GROUPS);
    if (cgroup_remove_all(c->lean, &c->record) < 0)
        return LEAN_FAILED;
    lean_step_end(STEP_REMOVE_GROUPS);
    lean_step_begin(STEP_REMOVE_FILES);
    if (!container_remove_files(c))
        return LEAN_FAILED;
    lean_step_end(STEP_REMOVE_FILES);
    run_poststop(c);
    return LEAN_DONE;
}

/* A `create` under way holds the lock: only --force ends it, and its children with it. */
static int stop_creator(const struct container *c) {
    int creator = -1;
    if (c->record.head.phase != RECORD_CREATING || !container_creator(c, &creator))
        return LEAN_DONE;
    if (!c->lean->force) {
        lean_error(c->lean, "cannot delete container %s that is not stopped: creating",
                   c->lean->id);
        close(creator);
        return LEAN_FAILED;
    }
    lean_step_begin(STEP_END_CREATOR);
    (void)syscall(SYS_pidfd_send_signal, creator, SIGKILL, NULL, 0);
    bool ended = lean_wait_end(creator, END_MS);
    lean_step_end(STEP_END_CREATOR);
    close(creator);
    if (!ended)
        lean_error(c->lean, "the process that creates the container does not end");
    return ended ? LEAN_DONE : LEAN_FAILED;
}

/* It keeps the end of the log and the status; then nobody asks for either. */
static void end_monitor(const struct container *c) {
    int monitor = -1;
    if (!(c->record.head.flags & RECORD_MONITOR) || !container_creator(c, &monitor))
        return;
    if (!lean_wait_end(monitor, MONITOR_MS))
        (void)syscall(SYS_pidfd_send_signal, monitor, SIGKILL, NULL, 0);
    (void)lean_wait_end(monitor, END_MS);
    close(monitor);
}

static int delete_locked(const struct container *c) {
    const struct lean *l = c->lean;
    enum status status = container_status(c);
    if (c->record.head.flags & RECORD_PYTHON)
        return LEAN_TO_PYTHON;
    if (!l->force && status != STATUS_STOPPED && status != STATUS_CREATED) {
        lean_error(l, "cannot delete container %s that is not stopped: %s", l->id,
                   container_status_text(status));
        return LEAN_FAILED;
    }
    if ((l->force || status == STATUS_CREATED) && end_processes(c) != LEAN_DONE)
        return LEAN_FAILED;
    end_monitor(c);
    return destroy(c);
}

/* A directory without a record: one that a `create` has just made, one that a `delete` has all but
 * removed, or the remains of one that was ended before it had done anything. */
static int delete_remains(struct container *c) {
    enum found found = container_lock(c, c->lean->force);
    if (found == FOUND)
        return delete_locked(c);
    if (found == FOUND_LOCKED)
        return container_tell(c->lean, FOUND_NOTHING);
    if (found == FOUND_NO_RECORD && !container_remove_files(c))
        return LEAN_FAILED;
    return c->lean->force ? LEAN_DONE : container_tell(c->lean, FOUND_NOTHING);
}

int lean_delete(struct lean *l) {
    struct container c;
    enum found found = container_find(l, &c);
    if (found == FOUND_NO_RECORD)
        return delete_remains(&c);
    if (found == FOUND && !(c.record.head.flags & RECORD_PYTHON)) {
        if (stop_creator(&c) != LEAN_DONE)
            return LEAN_FAILED;
        found = container_lock(&c, true);
    }
    if (found == FOUND)
        return delete_locked(&c);
    return found == FOUND_NOTHING && l->force ? LEAN_DONE : container_tell(l, found);
}

/* The name may be another container's by now; no other has this process as its maker. */
void lean_delete_own(struct lean *l, pid_t init) {
    struct container c;
    int creator = -1;
    l->force = true; /* frozen, it has ended all the same */
    if (container_find(l, &c) != FOUND || container_lock(&c, true) != FOUND)
        return;
    if (c.record.head.init_pid == init && c.record.head.creator_pid == getpid() &&
        container_creator(&c, &creator))
        (void)delete_locked(&c);
    if (creator >= 0)
        close(creator);
}
