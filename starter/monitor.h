/*
 * starter-monitor: the one process that stays beside a container of `apptainer-py oci`.  Master
 * becomes it when the container waits to be started, so the container's first process is its child.
 *
 *   starter-monitor NUMBER     of a sealed file: struct monitor_head, then MONITOR_TEXTS strings,
 *                              each ended by NUL; made by apptainer_py/model/monitor_frame.py
 *
 * It carries the container's streams to a log, to its own streams and to who has attached, tells
 * each change of status to the socket of --sync-socket, and keeps how the container ended.  Who
 * attaches or commands has the rights of the container's owner; none of them is waited for.
 */
#ifndef APY_MONITOR_H
#define APY_MONITOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define MONITOR_MAGIC "APYMON1"          /* 8 bytes with its NUL */
#define MONITOR_BYTES_MAX (4u << 20)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* The formats of --log-format. */
enum log_format { LOG_BASIC, LOG_KUBERNETES, LOG_JSON, LOG_FORMATS };

enum monitor_text {
    TEXT_STATE_BEFORE,                   /* the state as one line of JSON: up to the status, */
    TEXT_STATE_AFTER,                    /* and from behind it, without the closing brace */
    TEXT_SOCKETS,                        /* the JSON members of the two sockets */
    TEXT_LOG,                            /* path of the log */
    TEXT_PID_FILE,                       /* "": none */
    TEXT_SYNC,                           /* path of the socket that is told, "": none */
    TEXT_FREEZER,                        /* freezer.state or cgroup.freeze, "": none */
    TEXT_ROOT,                           /* of all containers' state */
    TEXT_ID,
    MONITOR_TEXTS
};

enum monitor_flag {
    MONITOR_TERMINAL = 1,                /* pty, not the three pipes */
    MONITOR_OWN_STREAMS = 2,             /* what comes and goes, goes by the own streams too */
    MONITOR_READS = 4,                   /* the own stdin is the container's */
    MONITOR_FLAGS_ALL = 7
};

struct monitor_head {
    char magic[8];
    uint32_t total;                      /* bytes of the file */
    uint32_t flags;                      /* enum monitor_flag */
    uint32_t format;                     /* enum log_format */
    int32_t init_pid;                    /* our child */
    int32_t dir_fd;                      /* the container's state directory */
    int32_t attach_fd, control_fd;       /* listening */
    int32_t log_fd;
    int32_t streams[3];                  /* our ends of the container's, or -1 */
    int32_t pty_fd;                      /* or -1 */
    int32_t ready_fd;                    /* of whoever has called and waits, or -1 */
    uint32_t next;                       /* what that one does then: 'c', 'd' or 'r' of lean.h */
    uint64_t created_ns;                 /* since 1970 */
};

_Static_assert(sizeof(struct monitor_head) == 72, "no padding");

struct settings {
    struct monitor_head head;
    const char *text[MONITOR_TEXTS];
};

/* monitor_log.c */
/* Bytes of a stream, as they come; a line that is not complete waits for its end. */
void log_bytes(const char *bytes, size_t size, bool is_error);
/* The rest of both streams. */
void log_end(void);
void log_open(int fd, const char *path, enum log_format format);
/* After it was moved away; the old one stays if there cannot be a new one. */
void log_reopen(void);

/* monitor_json.c: the one kind of object that the control socket takes */
struct command {
    bool has_size;
    uint16_t rows, columns;
    bool reopen_log, start, pause, resume;
};
enum json_found { JSON_MORE, JSON_OBJECT, JSON_WRONG };
enum json_found command_read(const char *bytes, size_t size, struct command *out);

/* monitor_state.c */
void state_open(const struct settings *s);
/* What others have done: started, paused or resumed it. */
void state_look(void);
bool state_started(void);
/* The wait status of the first process. */
void state_ended(int status);
int state_watch_fd(void);
void state_watch_read(void);
/* What --sync-socket has still to be told; false: nothing, or nobody listens. */
bool state_tell(void);

/* monitor_streams.c */
#define STREAMS_POLLED 24                /* at most */
struct pollfd;
void streams_open(const struct settings *s);
size_t streams_wish(struct pollfd *fds);
void streams_work(const struct pollfd *fds, size_t count);
void streams_resize(uint16_t rows, uint16_t columns);
/* The container has ended: what it wrote before goes to where it belongs. */
void streams_drain(void);
/* Bytes that are kept for who has still to take them. */
size_t streams_pending(void);
void streams_close(void);

/* monitor_control.c */
#define CONTROLS_POLLED 17
void control_open(const struct settings *s);
size_t control_wish(struct pollfd *fds);
void control_work(const struct pollfd *fds, size_t count);
/* A child has ended that is not the container. */
void control_job_ended(pid_t pid);
void control_close(void);

#endif
