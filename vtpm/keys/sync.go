package keys

import (
	"os"
	"path/filepath"
)

// SyncDir makes the name of a file that was just created or renamed durable.
func SyncDir(file string) error {
	d, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}
