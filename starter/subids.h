/* The text of /etc/subuid and /etc/subgid: which ids a user may have beside the own (subuid(5)). */
#ifndef APY_SUBIDS_H
#define APY_SUBIDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SUBUID_FILE "/etc/subuid"
#define SUBGID_FILE "/etc/subgid"
#define SUBIDS_FILE_BYTES (4u << 20)
#define SUBIDS_WANTED 65536u

struct subid_range {
    uint32_t first, count;
};

/* What is known of one file. */
enum subids_answer {
    SUBIDS_NONE,                       /* no line, or one that is switched off */
    SUBIDS_SMALL,                      /* lines, but each with fewer ids than wanted */
    SUBIDS_FOUND
};

enum subids_answer subids_find(const char *text, size_t size, const char *name, uint32_t id,
                               struct subid_range *found);
bool subids_taken(const char *text, size_t size, const char *name, uint32_t id,
                  const struct subid_range *range);
bool subids_accounts(const char *text, size_t size, const struct subid_range *range);

#endif
