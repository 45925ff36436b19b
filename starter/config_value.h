/* What each directive may be; between config.c and config_value.c. */
#ifndef APY_CONFIG_VALUE_H
#define APY_CONFIG_VALUE_H

#include "config.h"

enum config_kind {
    KIND_BOOL,
    KIND_ENUM,
    KIND_UINT,
    KIND_STRING,
    KIND_PATH,
    KIND_PATHLIST,
    KIND_LIST
};

struct config_row {
    const char *key;
    const char *type;
    const char *value;   /* the default */
    const char *allowed; /* see config.def */
    enum config_kind kind;
};

extern const struct config_row config_rows[CONFIG_COUNT];

/* CONFIG_COUNT for a key that is no directive. */
enum config_id config_id_of(const char *key);
/* The directive that was probably meant, or NULL when nothing is like it. */
const char *config_nearest_key(const char *key);
/* Whether one value is good; number becomes 1 or 0, the place of a word, or a number. */
bool config_value_allowed(const struct config_row *row, const char *value, uint64_t *number);
/* "a number within [0 256]": what a value of this directive should be. */
void config_value_expected(const struct config_row *row, char *text, size_t size);

#endif
