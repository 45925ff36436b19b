/*
 * The administrator's file: found, trusted, read.
 *
 * Used with privilege. libc only, nothing is allocated, and every loop is bounded by
 * CONFIG_FILE_BYTES. A struct config holds offsets instead of pointers, so it may be copied or lie
 * in memory that processes share. It is large, as struct config_error is: not for the stack.
 */
#ifndef APY_CONFIG_H
#define APY_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CONFIG_FILE_BYTES 65536u   /* a larger file is refused */
#define CONFIG_DEFAULT_BYTES 1024u /* all texts of config.def together */
#define CONFIG_ITEMS 8192u         /* values in all lists together */
#define CONFIG_PROBLEMS 16u        /* remembered; the rest is counted */

enum config_id {
#define CONFIG(id, ...) CONFIG_##id,
#include "config.def"
#undef CONFIG
    CONFIG_COUNT
};

/* What config_enum() returns: the place of the word in config.def. */
enum config_mount_dev { MOUNT_DEV_YES, MOUNT_DEV_NO, MOUNT_DEV_MINIMAL };
enum config_overlay { OVERLAY_YES, OVERLAY_NO, OVERLAY_TRY, OVERLAY_DRIVER };
enum config_underlay { UNDERLAY_YES, UNDERLAY_NO, UNDERLAY_PREFERRED };
enum config_setuid_squashfs { SETUID_SQUASHFS_YES, SETUID_SQUASHFS_NO, SETUID_SQUASHFS_IFLIMITED };
enum config_root_capabilities { ROOT_CAPS_FULL, ROOT_CAPS_FILE, ROOT_CAPS_NO };
enum config_memory_fs { MEMORY_FS_TMPFS, MEMORY_FS_RAMFS };

struct config {
    uint64_t number[CONFIG_COUNT]; /* BOOL, UINT, and the place of an ENUM's word */
    uint32_t text[CONFIG_COUNT];   /* the value as written, an offset into bytes */
    uint32_t line[CONFIG_COUNT];   /* where it was first given; 0 = nowhere */
    uint16_t first[CONFIG_COUNT];  /* a list's items: order[first] ... */
    uint16_t items[CONFIG_COUNT];  /* ... and how many */
    uint16_t order[CONFIG_ITEMS];
    uint16_t item_of[CONFIG_ITEMS];
    uint32_t item_text[CONFIG_ITEMS];
    uint32_t item_count;
    uint32_t used;
    char bytes[1 + CONFIG_DEFAULT_BYTES + CONFIG_FILE_BYTES + 1]; /* bytes[0] is the empty text */
};

struct config_problem {
    uint32_t line;    /* 0 = the file as a whole */
    char key[256];    /* the directive, what was written in its place, or the offending path */
    char text[160];   /* what is wrong with it */
    char nearest[64]; /* the directive that was probably meant, or "" */
};

struct config_error {
    uint32_t count; /* of all problems; the first CONFIG_PROBLEMS are kept */
    struct config_problem problem[CONFIG_PROBLEMS];
};

/* Opens the file for reading. With require_root_owned no component may be a link, and each one must
 * belong to root and be writable by nobody else; all that is wrong is added to why (zeroed before).
 * Returns a close-on-exec descriptor or -errno. */
int config_open(const char *path, bool require_root_owned, struct config_error *why)
    __attribute__((warn_unused_result));

/* The same for root's other files, which may be larger. */
int config_open_trusted(const char *path, uint32_t most, struct config_error *why)
    __attribute__((warn_unused_result));

/* Reads a file from its beginning. A directive that is wrong keeps its default and is added to why.
 * Returns 0, or -errno: -EINVAL when anything is wrong in the text. */
int config_parse_fd(int fd, struct config *out, struct config_error *why)
    __attribute__((warn_unused_result));

/* What holds where there is no file at all: only then do lists have defaults too. */
void config_defaults(struct config *out);

bool config_bool(const struct config *c, enum config_id id);
unsigned config_enum(const struct config *c, enum config_id id);
uint64_t config_uint(const struct config *c, enum config_id id);
/* The value of anything but a list, as written; never NULL. */
const char *config_string(const struct config *c, enum config_id id);
size_t config_list_count(const struct config *c, enum config_id id);
/* NULL past the end. */
const char *config_list_item(const struct config *c, enum config_id id, size_t n);
/* Whether a list names this user or group: by its name (NULL: it has none) or by its number. */
bool config_list_has(const struct config *c, enum config_id id, const char *name, uint64_t number);
/* The line that gives the value, 0 for a default. */
unsigned config_line(const struct config *c, enum config_id id);

const char *config_key(enum config_id id);
/* "BOOL", "ENUM", "UINT", "STRING", "PATH", "PATHLIST" or "LIST". */
const char *config_type(enum config_id id);

/* Adds a problem; key and nearest may be NULL. For the files of config*.c. */
void config_problem_add(struct config_error *why, uint32_t line, const char *key,
                        const char *nearest, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

#endif
