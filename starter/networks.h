/* CNI networks of one container: the administrator's files, who may have which, and the plugins. */
#ifndef APY_NETWORKS_H
#define APY_NETWORKS_H

#include "starter.h"

enum { NETWORKS_MAX = 8, PLUGINS_MAX = 8, PORTS_MAX = 16, NETWORK_FILE_BYTES = 32768 };
enum { NETWORK_NAME_BYTES = 64, NETWORK_ARGS_BYTES = 1024, NETWORK_RESULT_BYTES = 262144 };

/* What one plugin reads begins with these members of its object; the rest is ours. */
struct network_plugin {
    char type[NETWORK_NAME_BYTES];
    uint32_t from, length;             /* in the file's text */
    bool maps_ports;
};
/* Fixed size, no pointers: a child that has dropped hands it over. */
struct network_file {
    char version[16];
    uint32_t plugin_count;
    bool host_local;                   /* addresses are of the range given there */
    struct network_plugin plugins[PLUGINS_MAX];
    char text[NETWORK_FILE_BYTES];
};
struct network_port {
    uint16_t host, inside, protocol;
    int fd;                            /* bound, so that it is nobody else's meanwhile; or -1 */
};
struct network {
    char name[NETWORK_NAME_BYTES], args[NETWORK_ARGS_BYTES];
    struct network_file file;
    struct network_port ports[PORTS_MAX];
    size_t port_count;
};
struct networks {
    size_t count, port_count;
    struct network at[NETWORKS_MAX];
};
extern struct networks networks;

/* network_file.c; run without any privilege: 1 found, 0 another network, -1 none at all */
MUST_USE int network_read(const char *text, size_t size, const char *name,
                          struct network_file *out);
bool network_is_name(const char *text);
/* What a child has handed over is within its bounds. */
MUST_USE bool network_fits(const struct network_file *file);
MUST_USE int network_find(const struct launch *l, const char *name, struct network_file *out);

/* networks.c, in keeper: enum err */
MUST_USE int networks_add(const struct launch *l, const char *name, const char *args);
MUST_USE int networks_port(const struct launch *l, const uint64_t num[6], int *error);
void networks_close(void);

/* network_record.c, in the janitor; in memory that its twin shares, and in a file */
struct network_record {
    uint32_t format, size;
    char container[40];
    int32_t pid;                       /* the container's first process: undone once it has ended */
    int32_t running;                   /* the group of the plugin that runs, or ran last; 0 */
    uint64_t start, pid_space;
    uint32_t begun[NETWORKS_MAX];      /* how many plugins were told to add their part */
    uint32_t result[NETWORKS_MAX];     /* what the last one has said: its size, and which half */
};
extern struct network_record *network_record;
/* Before there is a twin: 0 or a negative errno, EUSERS where the user has as many as one may. */
MUST_USE int record_open(const struct launch *l, pid_t container);
void record_close(void);
/* 0 or an errno; and what was kept, its size. */
MUST_USE int record_keep(size_t network, const char *text, size_t size);
MUST_USE ssize_t record_result(size_t network, char *text, size_t size);
/* Undoes what is left of containers that have ended, whosever they were. */
void record_sweep(const struct launch *l);

/* network_run.c, in the janitor */
MUST_USE int networks_connect(const struct launch *l, int space, uint32_t *which, int *said);
void networks_disconnect(const struct launch *l, int space);
/* A child's status, -1 where a signal has ended it, or another negative errno; it has a group of
 * its own, which is killed when it takes too long. */
MUST_USE int networks_wait_for(pid_t pid);
/* In a child: in a group of its own, and gone with its parent; 0 or -1. */
MUST_USE int networks_be_child(pid_t parent);
/* Ends the processes of a group, where they are children of ours or become so. */
void networks_end_group(pid_t group);

/* network_rules.c, in the janitor */
void rules_clear(const char *container);
/* What takes the rules of a container out, of all that there are; false: there are none. */
MUST_USE bool rules_find(const char *text, size_t size, const char *container, int out);

#endif
