/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "heap.h"

#include <malloc.h>

void heap_trim(void)
{
    malloc_trim(0);
}
